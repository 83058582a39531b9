"""What the command line says, and where."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import run
from neuromerge_hf.cli.messages import fitted
from tiny_models import save_llamas


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llamas(tmp_path_factory.mktemp("models"))


def merge_words(models: Path, output: Path, *options: str) -> list[str]:
    return ["merge", str(models / "math"), str(models / "code"), "-o", str(output), *options]


def test_a_merge_says_what_comes_next(models: Path, tmp_path: Path) -> None:
    done = run(*merge_words(models, tmp_path / "a merge"))
    assert done.exit_code == 0, done.output
    folder = f"'{tmp_path / 'a merge'}'"
    card, push = f"neuromerge card {folder} --results results.json", f"neuromerge push {folder} OWNER/NAME"
    assert done.stdout.endswith(f"\nNext:\n  {card}\n  {push}\n")


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_a_quiet_merge_says_where_it_is(flag: str, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    done = subprocess.run(
        [sys.executable, "-m", "neuromerge_hf", *merge_words(models, output), flag],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{output}\n", "")


def test_errors_are_not_quiet(models: Path, tmp_path: Path) -> None:
    done = run(*merge_words(models, tmp_path), "--exclude", "*", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")


def test_messages_are_shown_on_request(models: Path, tmp_path: Path) -> None:
    done = run("-v", *merge_words(models, tmp_path / "merged"))
    assert done.stderr.startswith("Loading torch and transformers\nReading the metadata of the models\n")
    assert "Loading torch" not in run(*merge_words(models, tmp_path / "silent")).stderr
    done = run(*merge_words(models, tmp_path / "other"), "--quiet", "--verbose")
    assert done.exit_code == 2
    assert "and not both" in done.stderr


def test_in_a_terminal_no_word_is_broken(models: Path, tmp_path: Path) -> None:
    terminal, output = pty.openpty()
    words = [sys.executable, "-m", "neuromerge_hf", *merge_words(models, tmp_path / "merged")]
    environment = {**os.environ, "COLUMNS": "50", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
    os.close(output)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 10_000)
        except OSError:  # which is how Linux says that the other side is closed
            break
    assert process.wait() == 0
    lines = shown.decode().replace("\r", "").splitlines()
    long = [line for line in lines if len(line) > 50]
    assert any(str(tmp_path) in line for line in long), "a path stays whole"
    assert all(str(tmp_path) in line or re.match(r"  (neuromerge|expert|math|code) ", line) for line in long), long
    assert lines[:2] == ["Loading torch and transformers", "Reading the metadata of the models"]
    assert "interference is expected." in " ".join(lines)


def test_commands_and_pipes_are_left_as_they_are() -> None:
    command = f"  neuromerge push {'x' * 200} me/merged"
    assert fitted(command, is_terminal=True) == command
    sentence = "a word " * 50
    assert fitted(sentence, is_terminal=False) == sentence
    assert max(map(len, fitted(sentence, is_terminal=True).splitlines())) <= 80


def test_help_has_panels_and_an_example() -> None:
    text = run("merge", "--help").stdout
    for panel in ("Settings of the method", "Merged model", "How to run it"):
        assert f"─ {panel} ─" in text
    assert "Example: neuromerge merge me/math me/code-lora" in text
