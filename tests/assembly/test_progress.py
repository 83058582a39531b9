"""The progress bar of a merge ends at 100 %, whatever a method reads and however often."""

from pathlib import Path
from typing import Any

import pytest

from neuromerge_hf import merge
from neuromerge_hf.assembly import assemble
from neuromerge_hf.config import METHODS
from tiny_models import save_adapter, save_fine_tune, save_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    full = [save_fine_tune(base, root / f"full-{seed}", seed=seed) for seed in (1, 2)]
    adapters = [save_adapter(base, root / f"lora-{seed}", seed=seed) for seed in (3, 4)]
    return {"base": [base], "full": full, "adapters": adapters, "mixed": [full[0], adapters[0]]}


@pytest.mark.parametrize("kind", ["full", "adapters", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bar_ends_at_its_total(
    method: str, kind: str, models: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    def opened(*args: Any, **options: Any) -> Any:
        bars.append(tqdm(*args, **options))
        return bars[-1]

    tqdm = assemble.tqdm
    monkeypatch.setattr(assemble, "tqdm", opened)
    merge(models[kind], tmp_path / "merged", base_model=models["base"][0], config=method, device="cpu")
    (bar,) = bars
    assert bar.n == bar.total > 0
