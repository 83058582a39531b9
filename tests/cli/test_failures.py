"""A command that fails says so in one message, and its exit code says whose fault it is."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import neuromerge_hf.api
from commands import run
from neuromerge_hf import MergeError
from tiny_models import save_llamas

NEUROMERGE = Path(sys.executable).with_name("neuromerge")


@pytest.fixture
def raising(monkeypatch):
    """Let ``neuromerge plan`` raise an error."""

    def make(error):
        def plan_merge(*_, **__):
            raise error

        monkeypatch.setattr(neuromerge_hf.api, "plan_merge", plan_merge)

    return make


def test_an_unknown_error_is_one_line_and_exit_code_70(raising):
    raising(ZeroDivisionError("division\nby zero"))
    done = run("plan", "./a")
    assert done.exit_code == 70
    assert done.stderr == (
        "Error: ZeroDivisionError: division by zero. This is a fault of neuromerge_hf; run again with --traceback and "
        "report it.\n"
    )
    assert done.stdout == ""


@pytest.mark.parametrize("words", [["--traceback", "plan", "./a"], ["plan", "./a", "--traceback"]])
def test_the_traceback_is_shown_on_request(raising, words):
    for error, code in ((ZeroDivisionError("zero"), 70), (MergeError("wrong"), 1)):
        raising(error)
        done = run(*words)
        assert done.exit_code == code
        assert done.stderr.startswith("Traceback (most recent call last):\n")
        assert "in plan_merge" in done.stderr
        assert "Error" in done.stderr.splitlines()[-1]


def test_an_error_of_the_system_is_no_fault_of_the_library(raising):
    raising(OSError(5, "Input/output error", "/data/model"))
    done = run("plan", "./a")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: [Errno 5] Input/output error: '/data/model'. Run again with --traceback")
    raising(MemoryError())
    done = run("plan", "./a")
    assert (done.exit_code, done.stderr[:34]) == (1, "Error: There is not enough memory.")


def test_wrong_usage_has_exit_code_2():
    for words in (["plan"], ["plan", "./a", "--nothing"], ["nothing"], ["plan", "./a", "--threads", "0"], []):
        assert run(*words).exit_code == 2


def test_an_interrupted_command_exits_with_130(raising):
    raising(KeyboardInterrupt())
    done = run("plan", "./a")
    assert (done.exit_code, done.stderr) == (128 + signal.SIGINT, "Interrupted.\n")


def test_a_reader_that_goes_away_ends_a_command_without_a_word(tmp_path):
    models = save_llamas(tmp_path / "models")
    command = f"{NEUROMERGE} plan {models / 'code'} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_error_in_the_users_own_function_is_named_as_such(tmp_path, monkeypatch):
    models = save_llamas(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_eval.py").write_text("def score(model):\n    return model.nothing\n")
    done = run("compare", models / "math", "--base-model", models / "base", "--eval", "my_eval:score")
    assert done.exit_code == 1
    assert "my_eval:score failed with AttributeError" in done.stderr
    (tmp_path / "my_broken_eval.py").write_text("1 / 0\n")
    done = run("compare", models / "math", "--base-model", models / "base", "--eval", "my_broken_eval:score")
    assert (done.exit_code, "cannot be imported: ZeroDivisionError" in done.stderr) == (1, True)
