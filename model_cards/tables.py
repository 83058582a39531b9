"""The tables of a card, in Markdown."""

import os
from typing import Any

from neuromerge_hf.folder.results import BASE, MERGED, Result
from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.markdown import code, escaped, table
from neuromerge_hf.options import options_of
from neuromerge_hf.spec import MergeSpec

SHOWN = 8
"""The number of parameter names that a cell lists."""


def ingredients(card: MergeCard) -> str:
    """The merged models and their licences."""
    parents = card.report.parents
    rows = [["base", card.base_link, _commit(card.recipe.base_model.revision), "", "", _terms(parents[0])]]
    for expert, link, model, parent in zip(
        card.report.experts, card.expert_links, card.recipe.models, parents[1:], strict=True
    ):
        kind = "full fine-tune" if expert.kind == "full" else expert.kind
        task = card.task_of_expert(expert, parent.task)
        rows.append(["expert", link, _commit(model.revision), escaped(kind), escaped(task), _terms(parent)])
    return table(["role", "model", "commit", "kind", "task", "licence"], rows)


def _commit(revision: str | None) -> str:
    return code(revision[:8]) if revision else ""


def _terms(parent: Any) -> str:
    terms = escaped(parent.terms) if parent.terms else "not stated"
    return f"{terms}, gated" if parent.gated else terms


def settings(card: MergeCard) -> str:
    """Every hyper-parameter, the value that its rule gave if it has one, and whether it is the default."""
    spec = card.recipe.spec
    default = MergeSpec(models=spec.models, config=type(spec.config)())
    names = ("dtype", "tokenizer", "chat_template", "merge_heads")
    values = {**spec.config.to_dict(), **{name: getattr(spec, name) for name in names}}
    unset = {each.name: each.shown for each in options_of(type(spec.config)) if each.shown}
    defaults = {**default.config.to_dict(), **{name: getattr(default, name) for name in names}}
    rows = []
    for name, value in values.items():
        given = card.report.settings.get(name)
        is_rule = isinstance(value, str) and isinstance(given, float)
        used = f", which gave {given:.4g}" if is_rule else ""
        if value == card.method.own_rules.get(name, ...):
            used = f" (a rule of neuromerge_hf, not the paper's){used}"
        shown = unset.get(name, "none") if value is None else _setting(value)
        rows.append([code(name), f"{shown}{used}", "default" if value == defaults[name] else "chosen"])
    return table(["hyper-parameter", "value", ""], rows)


def _setting(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(code, value))
    # An expert may be named by a path of this machine, which a card must not show.
    return code(os.path.basename(value.rstrip("/\\")) if isinstance(value, str) else value)


def parameters(card: MergeCard) -> str:
    """How each class of parameters was merged."""
    report = card.report
    how = "merged neuron by neuron" if card.method.by_neuron else "merged entry by entry"
    others = "other weights with neurons" if report.by_matrix.names else "weights with neurons"
    classes = [
        ("weights of linear layers", "merged as whole matrices", report.by_matrix, False),
        (others, how, report.by_neuron, False),
        ("vectors (biases, norms) and scalars", "merged entry by entry", report.by_entry, False),
        ("all others", "the base's", report.from_base, True),
    ]
    rows = [
        [what, fate, f"{len(found.names):,}", f"{found.entries:,}", _names(found.names) if listed else ""]
        for what, fate, found, listed in classes
        if found.names
    ]
    if report.head:
        rows.append(
            ["head that the base lacks", "a mean of the experts'", f"{len(report.head):,}", "", _names(report.head)]
        )
    heads = {expert.name: expert.head for expert in report.experts if expert.head}
    for kept, fate in (
        ({name: head for name, head in heads.items() if name == report.loaded_head}, "in the weights, as it was"),
        ({} if report.loaded_head else heads, "kept apart, in `heads/`"),
        ({name: head for name, head in heads.items() if report.loaded_head not in (None, name)}, "left out"),
    ):
        if kept:
            count = f"{sum(map(len, kept.values())):,}"
            rows.append(["heads that the base lacks", fate, count, "", f"those of {_names(list(kept))}"])
    for name, owner in report.tied.items():
        rows.append(["tied", f"shares {code(owner)}", "1", "", code(name)])
    for name in report.untied:
        rows.append(["tied in the base", "has weights of its own now", "1", "", code(name)])
    return table(["parameters", "what became of them", "tensors", "numbers", "which"], rows)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(code, names[:SHOWN])) + more


def rounding(card: MergeCard) -> str:
    """What rounding left of the merged change, by the kinds of parameters: those that lost most come first."""
    found = card.report.rounding
    assert found is not None, "the template asks only where there is some"
    kinds = sorted(found.kinds, key=lambda kind: -kind.lost)
    rows = [
        [
            "all" if kind is found.model else code(kind.kind),
            _share(kind.lost, 2),
            "" if kind.cosine is None else f"{kind.cosine:.4f}",
            f"{kind.norm_ratio:.4f}",
        ]
        for kind in [found.model, *kinds[:SHOWN]]
    ]
    return table([f"rounded to {found.dtype}", "lost", "cosine", "norm, of the merged change's"], rows)


def changes(card: MergeCard) -> str:
    """Each expert's task vector: its norm, its parallel share and, of an election, what was trimmed and outvoted."""
    found = card.report.diagnostics
    assert found is not None, "the template asks only where there are some"
    columns = {
        "expert": [code(expert.name) for expert in found.experts],
        "norm": [f"{expert.norm:.4g}" for expert in found.experts],
        "of the base's": [_share(expert.relative_norm, 2) for expert in found.experts],
    }
    if found.elected:
        columns["entries kept"] = [_share(expert.entries_kept) for expert in found.experts]
        columns["L1 norm kept"] = [_share(expert.norm_kept) for expert in found.experts]
        columns["sigma"] = [f"{1 - expert.norm_kept:.3f}" for expert in found.experts]
    columns["parallel"] = [_share(expert.parallel, 2) for expert in found.experts]
    if found.elected:
        columns["outvoted"] = [_share(expert.outvoted_orthogonal) for expert in found.experts]
    return table(list(columns), zip(*columns.values(), strict=True))


def cosines(card: MergeCard) -> str:
    """The cosines between the experts' task vectors."""
    found = card.report.diagnostics
    assert found is not None, "the template asks only where there are some"
    names = [code(expert.name) for expert in found.experts]
    rows = [
        [name, *("" if value is None else f"{value:.3f}" for value in values)]
        for name, values in zip(names, found.cosines, strict=True)
    ]
    return table(["cosine", *names], rows)


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def results(card: MergeCard) -> str:
    """Scores of the base, the experts and the merged model, and the share of the best expert's score that it retains.

    If each task was measured with one expert only, as with heads of their own, the experts share a column.
    """
    experts = [expert.name for expert in card.report.experts]
    measured: dict[tuple[str, str, str | None], dict[str, Result]] = {}
    for result in card.report.results:
        measured.setdefault(result.measured, {})[result.model] = result
    alone = all(len(found.keys() & set(experts)) <= 1 for found in measured.values())
    rows = []
    for (task, metric, split), found in measured.items():
        of_experts = [_score(found.get(name)) for name in experts]
        if alone:
            of_experts = [f"{_score(found[name])} ({code(name)})" for name in experts if name in found] or [""]
        what = [escaped(task), escaped(metric), escaped(split or "")]
        rows.append([*what, _score(found.get(BASE)), *of_experts, _score(found.get(MERGED)), _retained(found)])
    columns = ["expert"] if alone else map(code, experts)
    return table(["task", "metric", "split", BASE, *columns, MERGED, "retained"], rows)


def _score(result: Result | None) -> str:
    return "" if result is None else f"{result.value:.4g}"


def _retained(found: dict[str, Result]) -> str:
    merged = found.get(MERGED)
    best = max((result.value for model, result in found.items() if model not in (MERGED, BASE)), default=0.0)
    if merged is None or not merged.greater_is_better or best <= 0 or merged.value < 0:
        return ""
    return f"{100 * merged.value / best:.1f} %"


def environment(card: MergeCard) -> str:
    """The software versions and the hardware of the merge."""
    rows = [[escaped(name), escaped(value)] for name, value in card.report.environment.items()]
    return table(["made with", ""], rows)


def weights(card: MergeCard) -> str:
    """The sha256 of every weight file."""
    rows = [[code(name), code(digest)] for name, digest in sorted(card.report.weights.items())]
    return table(["file", "sha256"], rows)
