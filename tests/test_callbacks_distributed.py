"""The callbacks in trainings of two processes, on the CPU with gloo."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuromerge_hf import AutoMergedModel, merge
from tiny_models import save_bert, save_fine_tune
from tiny_training import classifier, measure

TESTS = Path(__file__).parent


@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_one_process_merges_and_the_others_wait_longer_than_their_time_out(tmp_path, framework):
    base = save_bert(tmp_path / "base")
    other = save_fine_tune(base, tmp_path / "other", seed=1)
    folder = tmp_path / "run"
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(TESTS / "train_in_two_processes.py"), framework, str(base), str(other), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    run = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]

    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert (first["merged_by"], second["merged_by"]) == ([0], [])
    assert first["weights"] == second["weights"], "both have the trained weights again"
    assert first["training"] == second["training"]
    merge([folder / "trained", other], tmp_path / "expected", base_model=base)
    for name in ("model.safetensors", "heads/trained/head.safetensors"):
        assert (folder / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()

    expected = measure(AutoMergedModel.from_pretrained(folder / "merged", head="trained"))
    if framework == "transformers":
        *_, trained, merged = first["metrics"]
        assert trained["step"] == merged["step"] == 4
        # The Trainer multiplies the loss of an evaluation by the number of processes.
        factor = trained["eval_loss"] / measure(classifier(folder / "trained"))["loss"]
        merged = merged["merged_eval_loss"] / factor
    else:
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        merged = float(next(row["merged_val_loss"] for row in rows if row["merged_val_loss"]))
    assert merged == pytest.approx(expected["loss"], abs=1e-5)
