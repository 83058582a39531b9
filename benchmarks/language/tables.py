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

Scores = dict[tuple[str, int, str], Result]
"""Results by the kind of the experts, the seed, and the name: "base", "experts", or a method at its default."""

TITLES = {"base": "base", "experts": "experts' own"} | {name: method.title for name, method in METHODS.items()}
KINDS = {"lora": "LoRA adapters", "full": "full fine-tunes"}


def write_report(scores: Scores, folder: Path) -> None:
    """Write the tables and the compressed figures, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {"experts": kind, "seed": seed, "name": name} | asdict(result) for (kind, seed, name), result in scores.items()
    ]
    (folder / "language.json.gz").write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    text = "\n".join("\n".join(_table(scores, kind)) for kind in KINDS if any(key[0] == kind for key in scores))
    (folder / "tables.md").write_text(text)
    print(text)


def _table(scores: Scores, kind: str) -> Iterator[str]:
    seeds = sorted({seed for each, seed, _ in scores if each == kind})
    found = {name: [scores[kind, seed, name] for seed in seeds if (kind, seed, name) in scores] for name in TITLES}
    complete = {name: results for name, results in found.items() if len(results) == len(seeds)}
    skills = list(next(iter(complete.values()))[0].right)
    header = ["", *skills, "average", f"{TITLES[OURS]} minus it [95 %]", "loss", "perplexity of tales"]
    yield f"{KINDS[kind].capitalize()}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}: exact answers, %.\n"
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
