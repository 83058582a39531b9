"""`hf neuromerge` runs the command line, as an extension that `hf extensions install` has installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from neuromerge_hf import __version__

BIN = Path(sys.executable).parent


def test_hf_passes_its_words_on(tmp_path: Path) -> None:
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-neuromerge"
    folder.mkdir(parents=True)
    manifest = {
        "owner": "me",
        "repo": "hf-neuromerge",
        "repo_id": "me/hf-neuromerge",
        "short_name": "neuromerge",
        "executable_path": str(BIN / "hf-neuromerge"),
        "type": "python",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

    def hf(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / "hf", *words], env=environment, capture_output=True, text=True)

    assert hf("neuromerge", "--version").stdout == f"neuromerge {__version__}\n"
    failed = hf("neuromerge", "merge", "./missing", "--output", str(tmp_path / "merged"))
    assert failed.returncode == 1
    assert "Error: ./missing is not a folder on this machine" in failed.stderr
