"""A short, fixed sample of each campaign. `make fuzz` runs them at length."""

import pytest

from campaign import CAMPAIGNS, GOOD, load_campaign, run_cases

CASES = 25


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_no_case_of_the_sample_shows_a_defect(name):
    bad = [case for case in run_cases(load_campaign(name), iter(range(CASES)), 60) if case.outcome not in GOOD]
    assert not bad
