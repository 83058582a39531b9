"""The examples run as they stand, here with fewer steps."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "merged", "says"),
    [
        ("trainer_callback", "merged", "reviews: BertForSequenceClassification with the labels fresh, rotten"),
        ("sft_lora", "weekdays/merged", "tuesday wednesday"),
        ("lightning_callback", "merged", "BertForSequenceClassification with the labels statement, question"),
    ],
)
def test_example(tmp_path, name, merged, says):
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 80
    command = [sys.executable, str(script), "--output", str(tmp_path), "--steps", "2"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert says in run.stdout
    assert "evaluation set of the training" in (tmp_path / merged / "README.md").read_text()
