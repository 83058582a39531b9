"""Makes results/tables.md and results/language.json.gz."""

import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from bench import METHODS, Result

sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))

from intervals import difference
from methods import OURS

Scores = dict[tuple[str, int, int, str], Result]
"""Results by the kind of the experts, the seed, the number of skills, and the name.

It is "base", "experts", or a method at its default.
"""

TITLES = {"base": "base", "experts": "experts' own"} | {name: method.title for name, method in METHODS.items()}
KINDS = {"lora": "LoRA adapters", "full": "full fine-tunes"}


def write_report(scores: Scores, folder: Path) -> None:
    """Write the tables and the compressed figures, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {"experts": kind, "seed": seed, "skills": size, "name": name} | asdict(result)
        for (kind, seed, size, name), result in scores.items()
    ]
    (folder / "language.json.gz").write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    groups = sorted({(kind, size) for kind, _, size, _ in scores}, key=lambda group: (-group[1], group[0] != "lora"))
    text = "\n".join("\n".join(_table(scores, *group)) for group in groups)
    (folder / "tables.md").write_text(text)
    print(text)


def _table(scores: Scores, kind: str, size: int) -> Iterator[str]:
    measured = {(seed, name): result for (k, seed, s, name), result in scores.items() if (k, s) == (kind, size)}
    seeds = sorted({seed for seed, _ in measured})
    found = {name: [measured[seed, name] for seed in seeds if (seed, name) in measured] for name in TITLES}
    complete = {name: results for name, results in found.items() if len(results) == len(seeds)}
    skills = list(next(iter(complete.values()))[0].right)
    header = ["", *skills, "average", f"{TITLES[OURS]} minus it [95 %]", "loss", "perplexity of tales"]
    title = f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}"
    yield f"{title}, {size} skills, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}: exact answers, %.\n"
    yield f"| {' | '.join(header)} |"
    yield f"|---{'|---:' * (len(header) - 1)}|"
    for name, results in complete.items():
        by_skill = [100 * mean(r.right[skill].count("1") / len(r.right[skill]) for r in results) for skill in skills]
        lead = ""
        if name != OURS and OURS in complete:
            ours, other = ({s: [r.right[s] for r in each] for s in skills} for each in (complete[OURS], results))
            middle, low, high = difference(ours, other)
            lead = f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
        loss = mean(value for r in results for value in r.loss.values())
        cells = [*(f"{value:.1f}" for value in by_skill), f"{mean(by_skill):.1f}", lead, f"{loss:.3f}"]
        yield f"| {TITLES[name]} | {' | '.join(cells)} | {mean(r.perplexity for r in results):.1f} |"
    yield ""
