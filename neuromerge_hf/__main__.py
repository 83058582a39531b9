"""``python -m neuromerge_hf`` is the command line, for launchers that start modules."""

from neuromerge_hf.cli import app

if __name__ == "__main__":
    app(prog_name="neuromerge")
