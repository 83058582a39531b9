"""Regular expressions of adapters are matched only if each match ends soon."""

import time

import pytest

from neuromerge_hf.sources.peft.patterns import reason_against

USED = (
    r".*\.layers\.(0|1|2)\..*(q|v)_proj",
    r"^model\.layers\.\d+\.self_attn\.q_proj$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
    r"^(?!.*vision).*(?:q_proj|v_proj)$",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(?:.*\.)?[qv]_proj",
    r"[a-z(+*|]+\(\+",
    r"(?i)Q_PROJ(?#all of them)",
    "q_proj",
)


@pytest.mark.parametrize("expression", USED)
def test_expressions_that_people_use_are_matched(expression):
    assert reason_against(expression) is None


@pytest.mark.parametrize(
    "expression",
    ["(a+)+$", "(a|a)*b", "(a|aa)+$", "((a*)b?)*c", "(?:(?:a+)){2,}x", "(a?){40}b", ".*.*.*.*.*.*.*x", r"(\w*\.)+x"],
)
def test_expressions_that_could_take_forever_are_not_matched(expression):
    started = time.perf_counter()
    assert "could take years" in str(reason_against(expression))
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("expression", ["(", "*", "[", "a{2,1}", "(?P<a>x)(?P<a>y)", "(?<=a+)b", "\\"])
def test_expressions_that_are_not_valid_are_not_matched(expression):
    assert "not valid" in str(reason_against(expression))
