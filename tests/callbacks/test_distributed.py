"""In a training of two processes one merges, the other waits however long it takes, and both train on (CPU, gloo)."""

import csv
import json
import socket

import pytest

import processes
from neuromerge_hf import AutoMergedModel, merge
from tiny_models import save_bert, save_fine_tune
from tiny_training import MERGED, TRAINED, classifier, measure
from train_in_two_processes import train_in_turn


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """The folder of four trainings, by two processes that are started once."""
    folder = tmp_path_factory.mktemp("trainings")
    base = save_bert(folder / "base")
    other = save_fine_tune(base, folder / "other", seed=1)
    common = free_port(), processes.context.Barrier(2), base, other, folder
    outputs = [folder / "first.txt", folder / "second.txt"]
    both = [processes.start(train_in_turn, rank, *common, output=output) for rank, output in enumerate(outputs)]
    for process, output in zip(both, outputs, strict=True):
        assert processes.finish(process) == 0, output.read_text()[-3000:]
    return folder


def check(folder, merges):
    """One process has merged what was trained; returns what it saw."""
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert (first["merges"], second["merges"]) == (merges, 0)
    assert first["weights"] == second["weights"], "both have the trained weights again"
    assert first["training"] == second["training"]
    merge([folder / TRAINED, folder.parent / "other"], folder / "expected", base_model=folder.parent / "base")
    for name in ("model.safetensors", "heads/trained/head.safetensors"):
        assert (folder / MERGED / name).read_bytes() == (folder / "expected" / name).read_bytes()
    return first


def test_one_process_merges_and_the_others_wait_longer_than_their_time_out(trainings):
    folder = trainings / "ddp"
    *_, trained, merged = check(folder, merges=1)["metrics"]
    assert trained["step"] == merged["step"] == 4
    expected = measure(AutoMergedModel.from_pretrained(folder / MERGED, head="trained"))
    # The Trainer multiplies the loss of an evaluation by the number of processes.
    factor = trained["eval_loss"] / measure(classifier(folder / TRAINED))["loss"]
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"] * factor, abs=1e-5)


def test_lightning_on_two_processes(trainings):
    folder = trainings / "lightning"
    check(folder, merges=2)
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    merged = float(next(row["merged_val_loss"] for row in rows if row["merged_val_loss"]))
    expected = measure(AutoMergedModel.from_pretrained(folder / MERGED, head="trained"))
    assert merged == pytest.approx(expected["loss"], abs=1e-5)


def test_the_parts_that_fsdp_makes_of_a_model_are_gathered(trainings):
    folder = trainings / "fsdp"
    seen = check(folder, merges=3)
    trained = classifier(folder / TRAINED).state_dict()
    assert sum(tensor.double().sum().item() for tensor in trained.values()) == pytest.approx(seen["weights"])
    assert not seen["metrics"], "the merged model has no place in a model that is spread over processes"


def test_a_loop_with_accelerate_tunes_and_merges_with_both_processes(trainings):
    folder = trainings / "accelerate"
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("merges"), second.pop("merges")) == (3, 0), "no other merge than those of the trainings before"
    assert first == second, "both have the trained weights again, and the same metrics"
    trials = json.loads((folder / MERGED / "tuning.json").read_text())["trials"]
    assert len(trials) == 4
    best = min(trial["score"] for trial in trials)
    assert first["metrics"]["merged_loss"] == pytest.approx(best, abs=1e-5)
    expected = measure(AutoMergedModel.from_pretrained(folder / MERGED, head="trained"))
    assert best == pytest.approx(expected["loss"], abs=1e-5)
    assert first["metrics"]["loss"] == pytest.approx(measure(classifier(folder / TRAINED))["loss"], abs=1e-5)
