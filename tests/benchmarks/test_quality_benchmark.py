"""benchmarks/quality runs from training to tables, makes nothing twice, and merges as the library does.

It runs on a tiny encoder and two tiny tasks.
"""

import ast
import dataclasses
import io
import shutil
import sys
import tarfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from neuromerge_hf import AutoMergedModel, NeuroMergingConfig, merge

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"
WORDS = ("good", "bad", "fine", "poor", "old", "new", "red", "big")
NAMES = {
    "female": [f"{a}{b}a" for a in "BCDFGHJKLM" for b in "aeiou"],
    "male": [f"{a}{b}n" for a in "BCDFGHJKLM" for b in "aeiou"],
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark with a tiny BERT, two tasks of generated texts in archives of the real form, and two methods."""
    for folder in (FOLDER, FOLDER.parents[1] / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    import bench
    import experts
    import methods
    import run
    import scoring
    import tasks

    base = make_base(tmp_path / "base")
    make_archives(tmp_path / "cache" / "data")
    import merging
    import tables

    for module in (experts, merging, scoring):
        monkeypatch.setattr(module, "BASE", base)
    for module in (bench, run, tasks):
        monkeypatch.setattr(module, "TASKS", ("names", "products"))
    monkeypatch.setattr(experts, "RATES", {"full": 5e-3, "lora": 5e-3, "near": 5e-3})
    monkeypatch.setattr(experts, "EPOCHS", {"names": 25, "products": 25})
    for module in (experts, run):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
        monkeypatch.setattr(module, "KINDS", ("lora",))
    monkeypatch.setattr(run, "SIZES", (2,))
    monkeypatch.setattr(run, "TUNED_SIZE", 2)
    for name in set(methods.METHODS) - {"average", "neuromerging"}:
        monkeypatch.delitem(methods.METHODS, name)
    ours = dataclasses.replace(methods.METHODS["neuromerging"], tried=methods.METHODS["neuromerging"].tried[:2])
    monkeypatch.setitem(methods.METHODS, "neuromerging", ours)
    for module in (run, tables):
        monkeypatch.setattr(module, "OURS", "neuromerging")
    monkeypatch.setattr(run, "DEFAULTS", tuple(method.default for method in methods.METHODS.values()))
    monkeypatch.setattr(tasks, "VALIDATION", 20)
    tasks.load_splits.cache_clear()
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the model is too small for more
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    forget_modules()


@pytest.fixture
def summary(monkeypatch):
    """The module that makes the tables and the picture."""
    for folder in (FOLDER, FOLDER.parents[1] / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    import summary

    yield summary
    forget_modules()


def forget_modules() -> None:
    """Forget the benchmark's modules, whose names are too general to stay."""
    for name, module in list(sys.modules.items()):
        if FOLDER.parent in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]


def make_base(folder: Path) -> Path:
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_archives(folder: Path) -> None:
    names = {f"names-0.3.0/names/dist.{gender}.first": "\n".join(NAMES[gender]) for gender in NAMES}
    write_archive(folder / "names-0.3.0" / "names-0.3.0.tar.gz", names)
    rows = [f"{i}\t{2 - 4 * (i % 2)}\t{WORDS[i % 2]} {WORDS[2 + i % 3]} {chr(97 + i // 4)}" for i in range(100)]
    inner = folder / "inner.tar.gz"
    write_archive(inner, {"hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": "\n".join(rows)})
    packed = {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner.read_bytes()}
    write_archive(folder / "vaderSentiment-3.3.2" / "vaderSentiment-3.3.2.tar.gz", packed)


def write_archive(path: Path, members: dict[str, str | bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_the_benchmark_runs_and_makes_nothing_twice(bench, tmp_path):
    from figures import Scores

    cache, results = tmp_path / "cache", tmp_path / "results"

    def run() -> dict[Path, int]:
        bench.main(["--cache", str(cache), "--results", str(results)])
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}

    made, written = run(), {path.name: path.read_bytes() for path in results.iterdir()}
    assert written.keys() == {"quality.json.gz", "validation.json.gz", "tables.md", "quality.png"}
    assert run() == made
    assert {path.name: path.read_bytes() for path in results.iterdir()} == written

    found = Scores.load(results / "quality.json.gz").by_task
    experts = [scores for (*_, name), scores in found.items() if name == "experts"]
    assert all(min(scores["names"], scores["products"]) >= 90 for scores in experts)
    assert found.keys() == {
        ("lora", seed, 2, method)
        for seed in (0, 1)
        for method in ("base", "experts", "average", "neuromerging", "neuromerging tuned")
    }


def test_the_tables_and_the_picture_follow_from_the_figures_in_the_repository(summary, tmp_path):
    shutil.copy(FOLDER / "results" / "quality.json.gz", tmp_path)
    summary.write_summary(tmp_path)
    assert (tmp_path / "tables.md").read_text() == (FOLDER / "results" / "tables.md").read_text()
    assert (tmp_path / "quality.png").stat().st_size < 100_000


def test_the_figures_are_read_as_they_were_written(summary, tmp_path):
    from figures import Scores
    from methods import Setting

    scores = Scores({("full", 0, 1, "ties"): {"names": 100 * 5 / 7}}, {("full", 0, 1, "ties"): Setting("ties", 0.2, 1)})
    scores.save(tmp_path / "figures.json.gz")
    assert Scores.load(tmp_path / "figures.json.gz") == scores


def test_no_scripts_import_each_other():
    scripts = {path.stem: path for path in FOLDER.parent.rglob("*.py")}
    imports = {name: imported(path) & scripts.keys() for name, path in scripts.items()}
    assert "figures" in imports["summary"]
    TopologicalSorter(imports).prepare()  # raises where there is a circle


def imported(script: Path) -> set[str]:
    """The modules that a script imports, also inside functions."""
    nodes = list(ast.walk(ast.parse(script.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_a_merge_is_scored_as_the_model_that_is_loaded_with_the_head(bench, tmp_path):
    from experts import BASE, expert_folder
    from merging import add, merged_direction
    from methods import METHODS
    from scoring import Scorer, load_base

    cache = tmp_path / "cache"
    list(bench.Bench(cache).train([(0, "full")]))
    folders = {task: expert_folder(cache, "full", 0, task) for task in ("names", "products")}
    scorer = Scorer(folders, cache / "data", "test", "full")
    direction = merged_direction(list(folders.values()), METHODS["neuromerging"].default)
    scores = scorer.score(add(load_base(), direction, 1))
    merge(list(folders.values()), tmp_path / "merged", base_model=BASE, config=NeuroMergingConfig())
    for task in folders:
        model = AutoMergedModel.from_pretrained(
            tmp_path / "merged", head=task, merge_cache_dir=tmp_path / "heads"
        ).eval()
        right = [model(**inputs).logits.argmax(dim=-1) == labels for inputs, labels in scorer.batches[task]]
        share = scores[task].count("1") / len(scores[task])
        assert share == pytest.approx(torch.cat(right).float().mean().item(), abs=0.05)


def test_near_experts_keep_a_classifier_that_reads_embeddings(bench, tmp_path):
    from experts import expert_folder
    from scoring import Scorer

    cache = tmp_path / "cache"
    list(bench.Bench(cache).train([(0, "near")]))
    folders = {task: expert_folder(cache, "near", 0, task) for task in ("names", "products")}
    scores = Scorer(folders, cache / "data", "test", "near").score_experts()
    assert min(right.count("1") / len(right) for right in scores.values()) >= 0.9


def test_the_splits_share_no_text(bench, tmp_path):
    from tasks import load_splits

    for task in ("names", "products"):
        splits = load_splits(task, tmp_path / "cache" / "data")
        parts = [{text.casefold() for text, _ in part} for part in (splits.train, splits.validation, splits.test)]
        assert len(set.union(*parts)) == len(splits.train) + len(splits.validation) + len(splits.test)
        assert all(parts)
