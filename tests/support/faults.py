"""Commands on tiny models that a campaign kills, starves of disk space, or lets race."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forks import Forks, forks
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder import directory

BY_HAND = "Words that somebody wrote."
"""The text in the card of an earlier merge."""

WRITING = os.O_WRONLY | os.O_RDWR

GROWING = ("open", "os.mkdir", "os.rename", "os.symlink", "os.truncate", "fsync", "pwrite", "_exchange")
"""Steps that a full disk refuses."""

STEPS = (*GROWING, "os.remove", "os.rmdir")
"""Steps that change a file or a folder."""


def score(model: Any) -> float:
    """Score a model, for ``--tune`` and ``--eval``."""
    return float(sum(parameter.float().abs().mean() for parameter in model.parameters()))


def make_models() -> None:
    """Make the models and an earlier merge, and do each work once, so that nothing is left to be imported."""
    root = models()
    from neuromerge_hf import merge
    from tiny_models import save_bert, save_fine_tune

    base = save_bert(root / "base", hidden_size=4, intermediate_size=4, num_hidden_layers=1, vocab_size=16)
    for name, seed, labels in (("math", 1, 2), ("code", 2, 3)):
        save_fine_tune(base, root / name, seed=seed, model_class="BertForSequenceClassification", num_labels=labels)
        (root / name / "LICENSE").write_text(f"the licence of {name}")
    merge([root / "math"], root / "old", base_model=base)
    card = root / "old" / "README.md"
    card.write_text(card.read_text() + f"\n{BY_HAND}\n")
    results = [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.5}]
    (root / "results.json").write_text(json.dumps(results))
    for name, work in WORKS.items():
        shutil.copytree(root / "old", root / "warm" / "merged")
        try:
            work(root, root / "warm")
        except SystemExit as error:
            if error.code:
                raise RuntimeError(f"{name} failed") from error
        if name == "compare":
            shutil.copytree(root / "warm" / "table", root / "table")
            (root / "table" / "comparison.md").write_text("an earlier table")
        shutil.rmtree(root / "warm")


@contextmanager
def errors_reported() -> Iterator[None]:
    """Print a `MergeError` as the command line does, and exit with status 1."""
    try:
        yield
    except MergeError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def models() -> Path:
    """The folder of the models."""
    return Path(os.environ["HF_HOME"], "models-of-faults")


def server() -> Forks:
    """The server that has made the models."""
    return forks(make_models)


def command(*arguments: Any) -> None:
    """Run the command line."""
    from neuromerge_hf.cli import app

    app([str(argument) for argument in arguments])


def run_merge(root: Path, folder: Path) -> None:
    """Merge over an earlier merge, or into a new folder."""
    inputs = (root / "math", root / "code", "--base-model", root / "base")
    command("merge", *inputs, "--output", folder / "merged", "--overwrite", "--threads", 1)


def run_tune(root: Path, folder: Path) -> None:
    """Tune, and merge over an earlier merge, or into a new folder."""
    inputs = (root / "math", root / "code", "--base-model", root / "base")
    command("merge", *inputs, "--output", folder / "merged", "--overwrite", "--threads", 1, "--tune", "faults:score")


def run_compare(root: Path, folder: Path) -> None:
    """Compare two methods, with the table in a new folder or over an earlier table."""
    inputs = (root / "math", root / "code", "--base-model", root / "base", "--eval", "faults:score")
    command("compare", *inputs, "--output", folder / "table", "--method", "average", "--method", "ties", "--threads", 1)


def run_card(root: Path, folder: Path) -> None:
    """Add measurements to a merge's report and card."""
    command("card", folder / "merged", "--results", root / "results.json")


def run_push(root: Path, folder: Path) -> None:
    """Push a merge to the Hub of the tests."""
    command("push", folder / "merged", f"me/{folder.name}")


def run_load(root: Path, folder: Path) -> None:
    """Merge into the cache, and load the merge with a head."""
    from neuromerge_hf import AutoMergedModel

    inputs = [root / "math", root / "code"]
    AutoMergedModel.from_pretrained(inputs, base_model=root / "base", head="math", merge_cache_dir=folder / "cache")


def run_save(root: Path, folder: Path) -> None:
    """Save a model into a new folder."""
    from neuromerge_hf import AutoMergedModel

    model = AutoMergedModel.from_pretrained(root / "old")
    model.save_pretrained(folder / "saved")


def run_save_changed(root: Path, folder: Path) -> None:
    """Save a model that was trained further into a new folder."""
    from neuromerge_hf import AutoMergedModel

    model = AutoMergedModel.from_pretrained(root / "old")
    next(model.parameters()).data.add_(1)
    model.save_pretrained(folder / "saved")


WORKS: dict[str, Callable[[Path, Path], None]] = {
    "merge": run_merge,
    "tune": run_tune,
    "compare": run_compare,
    "card": run_card,
    "push": run_push,
    "load": run_load,
    "save": run_save,
    "save changed": run_save_changed,
}


def run(
    name: str,
    folder: Path,
    exchange: bool = True,
    before_step: Callable[[], None] | None = None,
    steps: tuple[str, ...] = STEPS,
) -> None:
    """Do one of `WORKS` in a folder, which also takes its temporary folders.

    Args:
        exchange: Whether the system can exchange two folders in one step.
        before_step: Called before each of these steps there.
        steps: The steps.
    """
    tempfile.tempdir = str(folder)
    if not exchange:
        directory._exchange = lambda one, other: False
    if before_step:
        _watch_steps(folder, before_step, steps)
    WORKS[name](models(), folder)


def count_steps(name: str, folder: Path, exchange: bool) -> None:
    """Do one of `WORKS`, and write the number of its steps into a file beside the folder."""
    steps: list[None] = []
    try:
        run(name, folder, exchange, lambda: steps.append(None))
    finally:
        folder.with_suffix(".steps").write_text(str(len(steps)))


def _watch_steps(folder: Path, action: Callable[[], None], steps: tuple[str, ...]) -> None:
    inside = os.fspath(folder)

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event != "open" or (arguments[2] or 0) & WRITING
        if event in steps and writes and str(arguments[0]).startswith(inside):
            action()

    sys.addaudithook(listen)
    for module, name in ((os, "fsync"), (os, "pwrite"), (directory, "_exchange")):
        _patch(module, name, action)


def _patch(module: Any, name: str, action: Callable[[], None]) -> None:
    function = getattr(module, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        action()
        return function(*arguments, **options)

    setattr(module, name, patched)


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder. A link counts as what it points to."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
