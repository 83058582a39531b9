"""The page of an inspection opens in a real browser, needs nothing else, and answers."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Page, browser_page
from neuromerge_hf import Inspection, inspect_models, merge
from tiny_models import save_adapter, save_fine_tune, save_llama

HEAT = "#heat .cell"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "math", seed=1)
    save_adapter(base, root / "code", seed=2, target_modules=["q_proj", "up_proj"])
    merge([root / "math", root / "code"], root / "merged", base_model=base, dtype="bfloat16", device="cpu")
    return root


@pytest.fixture(scope="module")
def before(models: Path) -> Inspection:
    return inspect_models([models / "math", models / "code"], base_model=models / "base", device="cpu")


@pytest.fixture
def page() -> Iterator[Page]:
    with browser_page() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 800, 1600])
def test_the_page_opens_without_an_error_or_a_request(
    width: int, dark: bool, page: Page, before: Inspection, tmp_path: Path
) -> None:
    page.open(before.save(tmp_path / "page.html"), width, dark)
    assert page.run("document.title") == before.title
    assert page.run("document.querySelector('#verdict').textContent") == before.diagnostics.verdict
    back = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) == dark
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the page"
    assert page.problems == []


def test_controls_choose_what_is_shown(page: Page, before: Inspection, tmp_path: Path) -> None:
    page.open(before.save(tmp_path / "page.html"))
    layers = [layer.name for layer in before.diagnostics.layers]
    assert page.run(f"document.querySelectorAll({HEAT!r}).length") == 2 * len(layers)
    assert page.run("document.querySelectorAll('#value option').length") == 2, "nothing was merged"
    page.choose("#kind", "self_attn.q_proj.weight")
    assert page.run(f"document.querySelectorAll({HEAT!r}).length") == 2 * 2
    page.choose("#expert", "code")
    assert page.run(f"document.querySelectorAll({HEAT!r}).length") == 2
    page.choose("#value", "rank")
    assert "Effective rank of each expert's change: self_attn.q_proj.weight" in page.run("document.body.textContent")
    assert page.run("document.querySelector('#kept').hidden")
    page.point_at(HEAT)
    (first, *_) = [each for each in before.diagnostics.parameters if "q_proj" in each.name]
    assert page.run("document.querySelector('#tip').textContent").splitlines()[:2] == ["code", first.name]
    assert page.run("getComputedStyle(document.querySelector('#tip')).display") == "block"
    assert page.problems == []


def test_tables_are_sorted_by_a_click(page: Page, before: Inspection, tmp_path: Path) -> None:
    page.open(before.save(tmp_path / "page.html"))
    names = "[...document.querySelectorAll('#experts td:first-child')].map((cell) => cell.textContent)"
    changes = {expert.name: expert.relative_norm or 0.0 for expert in before.diagnostics.experts}
    assert page.run(names) == sorted(changes, key=lambda name: -changes[name])
    button = "document.querySelectorAll('#experts th button')[{}].click()"
    page.run(button.format(2))
    assert page.run(names) == sorted(changes, key=lambda name: changes[name])
    page.run(button.format(0))
    assert page.run(names) == sorted(changes)
    assert page.problems == []


def test_the_page_of_a_merge_shows_what_it_keeps_and_what_rounding_lost(
    page: Page, models: Path, tmp_path: Path
) -> None:
    found = inspect_models(models / "merged")
    page.open(found.save(tmp_path / "page.html"))
    assert not page.run("document.querySelector('#kept').hidden")
    assert not page.run("document.querySelector('#rounding').hidden")
    assert page.run("document.querySelector('#neurons').hidden")
    page.choose("#value", "kept")
    assert "Kept of each expert's change" in page.run("document.querySelector('#heat h2').textContent")
    assert page.problems == []


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028", "a" * 300]
)
def test_names_are_only_text(name: str, page: Page, before: Inspection, tmp_path: Path) -> None:
    experts = [dataclasses.replace(expert, name=name) for expert in before.diagnostics.experts]
    layers = [dataclasses.replace(layer, name=f"{name}.{layer.name}") for layer in before.diagnostics.layers]
    found = dataclasses.replace(before.diagnostics, experts=experts, layers=layers)
    page.open(dataclasses.replace(before, title=name, diagnostics=found).save(tmp_path / "page.html"))
    assert page.run("document.querySelector('#title').textContent") == name
    assert page.run("document.querySelectorAll('img, script').length") == 1
    assert page.problems == []


def test_a_large_model_makes_a_small_page(before: Inspection) -> None:
    """80 blocks with 9 weights each, and 8 experts."""
    found = before.diagnostics
    experts = [found.experts[0]] * 8
    layer = dataclasses.replace(
        found.layers[0], relative_norms=[0.123456] * 8, survivals=[0.123456] * 8, cosines=[[0.123456] * 8] * 8
    )
    layers = [dataclasses.replace(layer, name=f"model.layers.{number}") for number in range(80)]
    parameters = [
        dataclasses.replace(
            layer, name=f"{each.name}.self_attn.{kind}_proj.weight", layer=each.name, effective_ranks=[9.1] * 8
        )
        for each in layers
        for kind in "abcdefghi"
    ]
    large = dataclasses.replace(found, experts=experts, layers=layers, parameters=parameters)
    assert len(dataclasses.replace(before, diagnostics=large).to_html()) < 2_000_000
