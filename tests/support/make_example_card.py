"""Writes model_cards/example.md and its picture, the card of the demo's merge: `make card`.

The measurements are those of `python examples/demo.py --results examples/results.json`.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from neuromerge_hf import NeuroMergingConfig
from neuromerge_hf.folder.results import load_results
from neuromerge_hf.model_cards.picture import NAME

ROOT = Path(__file__).parents[2]
CARD = ROOT / "model_cards" / "example.md"
PICTURE = ROOT / "model_cards" / NAME


def make(folder: Path) -> Path:
    """Merge the demo's experts into a folder, and give its card the demo's measurements."""
    sys.path.append(str(ROOT / "examples"))
    from demo import merge_experts

    experts = sorted(path for path in (ROOT / "examples" / "experts").iterdir() if path.is_dir())
    report = merge_experts(experts, folder / "merged", NeuroMergingConfig())
    report.add_results(load_results(ROOT / "examples" / "results.json"))
    return folder / "merged"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        merged = make(Path(temporary))
        shutil.copyfile(merged / "README.md", CARD)
        shutil.copyfile(merged / NAME, PICTURE)
