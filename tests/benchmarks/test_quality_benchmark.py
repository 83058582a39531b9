"""benchmarks/quality from end to end, with a tiny encoder and two tiny tasks: from training to tables."""

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

from neuromerge_hf import AutoMergedModel, merge

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"
WORDS = ("good", "bad", "fine", "poor", "old", "new", "red", "big")
NAMES = {
    "female": [f"{a}{b}a" for a in "BCDFGHJKLM" for b in "aeiou"],
    "male": [f"{a}{b}n" for a in "BCDFGHJKLM" for b in "aeiou"],
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark on a tiny BERT, two tasks of generated texts in archives of the real form, and two methods."""
    for folder in (FOLDER, FOLDER.parents[1] / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    import experts
    import methods
    import run
    import scoring
    import summary
    import tasks

    base = make_base(tmp_path / "base")
    make_archives(tmp_path / "cache" / "data")
    for module in (experts, methods, scoring):
        monkeypatch.setattr(module, "BASE", base)
    for module in (run, scoring, summary, tasks):
        if hasattr(module, "TASKS"):
            monkeypatch.setattr(module, "TASKS", ("names", "products"))
    monkeypatch.setattr(experts, "RATES", {"full": 5e-3, "lora": 5e-3, "near": 5e-3})
    monkeypatch.setattr(experts, "EPOCHS", {"names": 25, "products": 25})
    for module in (experts, run, summary):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
        monkeypatch.setattr(module, "KINDS", ("lora",))
    monkeypatch.setattr(run, "SIZES", (2,))
    for name in set(methods.METHODS) - {"average", "neuromerging"}:
        monkeypatch.delitem(methods.METHODS, name)
    ours = dataclasses.replace(methods.METHODS["neuromerging"], tried=methods.METHODS["neuromerging"].tried[:2])
    monkeypatch.setitem(methods.METHODS, "neuromerging", ours)
    monkeypatch.setattr(run, "DEFAULTS", tuple(method.default for method in methods.METHODS.values()))
    monkeypatch.setattr(tasks, "VALIDATION", 20)
    monkeypatch.setattr(summary, "RESULTS", tmp_path / "results")
    tasks.load_splits.cache_clear()
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the model is too small for more
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    for name, module in list(sys.modules.items()):
        if FOLDER in Path(getattr(module, "__file__", None) or "/").parents:
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
    cache = tmp_path / "cache"
    bench.main(["--cache", str(cache)])
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    tables = (tmp_path / "results" / "tables.md").read_text()
    bench.main(["--cache", str(cache)])
    assert made == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert tables == (tmp_path / "results" / "tables.md").read_text()

    found = json.loads((tmp_path / "results" / "quality.json").read_text())
    tested = found["test accuracy in % by task"]
    assert all(min(row["names"], row["products"]) >= 90 for row in tested if row["method"] == "experts")
    assert {(row["experts"], row["seed"], row["method"]) for row in tested} == {
        ("lora", seed, method)
        for seed in (0, 1)
        for method in ("base", "experts", "average", "average tuned", "neuromerging", "neuromerging tuned")
    }


def test_the_paper_s_variant_is_the_library_s_merge(bench, tmp_path):
    import variants
    from methods import METHODS, merged_direction

    list(bench.Bench(tmp_path / "cache").train([(0, "full"), (0, "lora")]))
    for kind in ("full", "lora"):
        experiment = variants.Experiment(tmp_path / "cache", kind, 0)
        automatic = 1 / (1 - experiment.vectors.trimming(0.2)[1])
        theirs = merged_direction(list(experiment.folders.values()), METHODS["neuromerging"].default)
        ours = experiment.vectors.direction(0.2, "mean")
        assert theirs
        assert theirs.keys() <= ours.keys()
        for name, change in ours.items():
            found = theirs.get(name, torch.zeros_like(change))
            torch.testing.assert_close(found, automatic * change, rtol=1e-3, atol=1e-5)


def test_the_open_questions_are_answered_from_training_to_table(bench, tmp_path, monkeypatch):
    import variants
    from methods import METHODS

    cache = tmp_path / "cache"
    monkeypatch.setattr(variants, "SETS", {2: (("names", "products"),)})
    variants.main(["--cache", str(cache), "--kinds", "full", "near", "--seeds", "0"])
    files = {kind: variants.variants_file(cache, kind, 0, ("names", "products")) for kind in ("full", "near")}
    made = {kind: file.read_text() for kind, file in files.items()}
    table = (tmp_path / "results" / "variants.md").read_text()
    variants.main(["--cache", str(cache), "--kinds", "full", "near", "--seeds", "0"])
    assert made == {kind: file.read_text() for kind, file in files.items()}
    assert table == (tmp_path / "results" / "variants.md").read_text()

    rows = [json.loads(line) for line in made["full"].splitlines()]
    assert len(rows) == len(variants.variants(("names", "products"), "full"))
    ours = next(row for row in rows if row["variant"] == dataclasses.asdict(variants.Variant(0.2, "mean", "automatic")))
    job = bench.Job("full", 0, 2, METHODS["neuromerging"].default, "validation")
    assert ours["accuracy"] == pytest.approx(bench.Bench(cache).score(job), abs=0.05)
    for row in rows:
        if row["variant"]["rule"] != "automatic":
            assert row["length"] == pytest.approx(float(row["variant"]["rule"]))


def test_the_head_of_a_near_expert_is_fitted_to_the_base_and_stays(bench, tmp_path):
    from experts import BASE, fit_head, sorted_batches, tokenize, train_expert
    from scoring import encoder_of, load_base, load_expert
    from tasks import load_splits
    from train_experts import new_expert

    splits = load_splits("products", tmp_path / "cache" / "data")
    train_expert(splits, "near", 0, tmp_path / "expert")
    expert = load_expert(tmp_path / "expert")
    assert any(not torch.equal(weight, load_base()[name]) for name, weight in encoder_of(expert).items())

    tokenizer = BertTokenizerFast.from_pretrained(BASE)
    set_seed(0)
    fitted = new_expert(splits, str(BASE), full=True)
    fit_head(fitted, list(sorted_batches(tokenizer, tokenize(tokenizer, splits.train), 32)))
    torch.testing.assert_close(expert.classifier.weight, fitted.classifier.weight, rtol=0.02, atol=0.02)


def test_a_merge_is_scored_as_the_model_that_is_loaded_with_the_head(bench, tmp_path):
    from experts import BASE, expert_folder
    from methods import METHODS, add, merged_direction
    from scoring import Scorer, load_base

    cache = tmp_path / "cache"
    list(bench.Bench(cache).train([(0, "full")]))
    folders = {task: expert_folder(cache, "full", 0, task) for task in ("names", "products")}
    scorer = Scorer(folders, cache / "data", "test", "full")
    direction = merged_direction(list(folders.values()), METHODS["neuromerging"].default)
    scores = scorer.score(add(load_base(), direction, 1))
    merge(list(folders.values()), tmp_path / "merged", base_model=BASE)
    for task in folders:
        model = AutoMergedModel.from_pretrained(tmp_path / "merged", head=task, cache_dir=tmp_path / "heads").eval()
        right = [model(**inputs).logits.argmax(dim=-1) == labels for inputs, labels in scorer.batches[task]]
        assert scores[task] == pytest.approx(torch.cat(right).float().mean().item(), abs=0.05)


def test_the_splits_share_no_text(bench, tmp_path):
    from tasks import load_splits

    for task in ("names", "products"):
        splits = load_splits(task, tmp_path / "cache" / "data")
        parts = [{text.casefold() for text, _ in part} for part in (splits.train, splits.validation, splits.test)]
        assert len(set.union(*parts)) == len(splits.train) + len(splits.validation) + len(splits.test)
        assert all(parts)
