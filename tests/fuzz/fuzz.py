"""Runs the campaigns against faults and hostile input, each for a given time.

    make fuzz SECONDS=600 SEED=0
    .venv/bin/python tests/fuzz/fuzz.py headers --seed 1234 --cases 1     # repeats one case

It prints a table of how the cases ended, and the seed of each that shows a defect.
"""

import argparse
import importlib
import sys
from itertools import islice
from pathlib import Path

from campaign import CAMPAIGNS, GOOD, Outcome, load_campaign, run_campaign, run_cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", choices=[*CAMPAIGNS, []], metavar="CAMPAIGN", help=", ".join(CAMPAIGNS))
    parser.add_argument("--seconds", type=float, default=60, help="how long all campaigns together may take")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first case; the next one's is one more")
    parser.add_argument("--cases", type=int, help="how many cases of each campaign to try, and to print")
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1] / "support"))  # what campaigns share with tests
    importlib.import_module("loopback_environment").start()
    names = options.campaigns or list(CAMPAIGNS)
    if options.cases:
        seeds = range(options.seed, options.seed + options.cases)
        tried = [case for name in names for case in run_cases(load_campaign(name), iter(seeds), options.seconds)]
        for case in tried:
            print(f"{case.seed}: {case.outcome.value}: {case.detail}")
        return int(any(case.outcome not in GOOD for case in tried))
    failed = 0
    print(f"| campaign | cases | {' | '.join(outcome.value for outcome in Outcome)} |")
    print("|---|" + "---:|" * (1 + len(Outcome)))
    for name in names:
        outcomes, bad = run_campaign(name, options.seed, options.seconds / len(names))
        print(f"| {name} | {outcomes.total()} | {' | '.join(str(outcomes[each]) for each in Outcome)} |", flush=True)
        failed += len(bad)
        for case in islice(bad, 20):
            print(f"{name} --seed {case.seed} --cases 1: {case.outcome.value}: {case.detail}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
