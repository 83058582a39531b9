"""A short, fixed sample of each campaign. `make fuzz` runs them at length."""

import sys

import pytest

from campaign import CAMPAIGNS, GOOD, load_campaign, run_cases

CASES = 25
"""How many cases the sample has, unless the campaign's module says otherwise."""


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_no_case_of_the_sample_shows_a_defect(name):
    try_case = load_campaign(name)
    cases = getattr(sys.modules[try_case.__module__], "CASES", CASES)
    bad = [case for case in run_cases(try_case, iter(range(cases)), 60) if case.outcome not in GOOD]
    assert not bad
