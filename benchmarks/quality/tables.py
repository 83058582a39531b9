"""Makes the tables of results/tables.md."""

from collections.abc import Iterator, Sequence
from statistics import mean, stdev

from figures import Scores
from methods import METHODS, OURS

TITLES = {"full": "Full fine-tunes", "lora": "LoRA adapters", "far": "Far fine-tunes", "near": "Near fine-tunes"}
REFERENCES = {"base": "base", "experts": "experts' own"}


def tables(scores: Scores) -> str:
    """Return all tables in Markdown."""
    sections = {
        f"Average test accuracy in %, {len(scores.tasks)} tasks, "
        f"mean ± standard deviation over {len(scores.seeds)} seeds.": _methods(scores),
        f"{METHODS[OURS].title} at its default minus the other, in points, with 95% intervals.": _differences(scores),
        f"Average test accuracy in % of the first {_listed(scores.sizes)} tasks.": _sizes(scores),
        **{f"{TITLES[kind]}, task by task, mean over the seeds.": _tasks(scores, kind) for kind in scores.kinds},
        "What was chosen on the validation texts, for each seed: density / scale.": _chosen(scores),
    }
    return "\n".join(f"{title}\n\n{''.join(_table(rows))}" for title, rows in sections.items())


def _methods(scores: Scores) -> Iterator[list[str]]:
    yield _header(scores)
    for name, title in REFERENCES.items():
        yield [title, *(cell for kind in scores.kinds for cell in (_spread(scores.averages(kind, name)), ""))]
    for name, method in METHODS.items():
        cells = []
        for kind in scores.kinds:
            cells.append(_spread(scores.averages(kind, name)))
            cells.append(_spread(scores.averages(kind, f"{name} tuned")) if method.tried else "")
        yield [method.title, *cells]


def _differences(scores: Scores) -> Iterator[list[str]]:
    columns = [(kind, size) for kind in scores.kinds for size in scores.sizes]
    yield ["", *(f"{TITLES[kind]}, {size}" for kind, size in columns)]
    for name, title in _titles().items():
        if name not in (OURS, *REFERENCES):
            found = [scores.differences.get((kind, size, name)) for kind, size in columns]
            if not any(found):
                continue
            yield [title, *(f"{each[0]:+.1f} [{each[1]:+.1f}, {each[2]:+.1f}]" if each else "" for each in found)]


def _titles() -> dict[str, str]:
    titles = dict(REFERENCES)
    for name, method in METHODS.items():
        titles[name] = method.title
        if method.tried:
            titles[f"{name} tuned"] = f"{method.title}, tuned"
    return titles


def _sizes(scores: Scores) -> Iterator[list[str]]:
    columns = [(kind, size) for kind in scores.kinds for size in scores.sizes]
    yield ["", *(f"{TITLES[kind]}, {size}" for kind, size in columns)]
    for name, title in _titles().items():
        found = [scores.averages(kind, name, size) for kind, size in columns]
        if any(found):
            yield [title, *map(_spread, found)]


def _tasks(scores: Scores, kind: str) -> Iterator[list[str]]:
    names = list(REFERENCES)
    for name, method in METHODS.items():
        names += [name, f"{name} tuned"] if method.tried else [name]
    yield ["", *scores.tasks]
    for name in names:
        keys = [(kind, seed, len(scores.tasks), name) for seed in scores.seeds]
        rows = [scores.by_task[key] for key in keys if key in scores.by_task]
        if rows:
            yield [name.replace("_", " "), *(f"{mean(row[task] for row in rows):.1f}" for task in scores.tasks)]


def _chosen(scores: Scores) -> Iterator[list[str]]:
    columns = [(kind, seed) for kind in scores.kinds for seed in scores.seeds]
    yield ["", *(f"{TITLES[kind]}, seed {seed}" for kind, seed in columns)]
    for name, method in METHODS.items():
        settings = [scores.chosen.get((kind, seed, len(scores.tasks), name)) for kind, seed in columns]
        if any(settings):
            cells = [f"{each.density or '-'} / {each.scale:g}" if each else "" for each in settings]
            yield [f"{method.title} ({method.scale})", *cells]


def _header(scores: Scores) -> list[str]:
    return ["", *(TITLES[kind] + suffix for kind in scores.kinds for suffix in (", default", ", tuned"))]


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" if values else ""


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _table(rows: Iterator[list[str]]) -> Iterator[str]:
    header = next(rows)
    yield f"| {' | '.join(header)} |\n"
    yield f"|---{'|---:' * (len(header) - 1)}|\n"
    for row in rows:
        yield f"| {' | '.join(row)} |\n"
