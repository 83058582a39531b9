"""Writes the card of the demo's merge, model_cards/example.md, and its picture (`make card`).

The measurements come from `python examples/demo.py --results examples/results.json`.
"""

import importlib
import shutil
import sys
import tempfile
from pathlib import Path

from neuromerge_hf import NeuroIsoConfig
from neuromerge_hf.api import add_results
from neuromerge_hf.folder.results import load_results
from neuromerge_hf.model_cards.picture import NAME

ROOT = Path(__file__).parents[2]
CARD = ROOT / "model_cards" / "example.md"
PICTURE = ROOT / "model_cards" / NAME


def make(folder: Path) -> Path:
    """Merge the demo's experts, add the demo's measurements to the card, and return the merge's folder."""
    sys.path.append(str(ROOT / "examples"))
    merge_experts = importlib.import_module("demo").merge_experts

    experts = sorted(path for path in (ROOT / "examples" / "experts").iterdir() if path.is_dir())
    report = merge_experts(experts, folder / "merged", NeuroIsoConfig())
    add_results(report.output_dir, load_results(ROOT / "examples" / "results.json"))
    return folder / "merged"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        merged = make(Path(temporary))
        shutil.copyfile(merged / "README.md", CARD)
        shutil.copyfile(merged / NAME, PICTURE)
