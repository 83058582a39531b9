"""The command line, run in this process."""

from typer.testing import CliRunner, Result

from neuromerge_hf.cli import app


def run(*arguments: object) -> Result:
    """Run ``neuromerge`` with some arguments. The result has its output and its exit code."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
