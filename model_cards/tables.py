"""The tables of a card, in Markdown."""

import os
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from neuromerge_hf.folder.results import BASE, MERGED, Comparison, Result, comparisons
from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.markdown import code, escaped, folded, table
from neuromerge_hf.options import options_of
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.text import decimal, kind_of, percent

SHOWN = 8
"""The number of names that a cell lists."""

LISTED_KINDS = 40
"""The number of kinds of parameters that a list names."""


def merged_models(card: MergeCard) -> str:
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
    """Every hyper-parameter, and the value that its rule gave, if any. Those at their defaults are folded away."""
    spec = card.recipe.spec
    default = MergeSpec(models=spec.models, config=type(spec.config)())
    names = ("dtype", "tokenizer", "chat_template", "merge_heads")
    values = {**spec.config.to_dict(), **{name: getattr(spec, name) for name in names}}
    unset = {each.name: each.shown for each in options_of(type(spec.config)) if each.shown}
    defaults = {**default.config.to_dict(), **{name: getattr(default, name) for name in names}}
    chosen: list[list[str]] = []
    at_default: list[list[str]] = []
    for name, value in values.items():
        given = card.report.settings.get(name)
        is_rule = isinstance(value, str) and isinstance(given, float)
        used = f", which gave {given:.4g}" if is_rule else ""
        if value == card.method.own_rules.get(name, ...):
            used = f" (a rule of neuromerge_hf, not the paper's){used}"
        shown = unset.get(name, "none") if value is None else _setting(value)
        (at_default if value == defaults[name] else chosen).append([code(name), f"{shown}{used}"])
    header = ["hyper-parameter", "value"]
    parts = [table(header, chosen)] if chosen else []
    if at_default:
        summary = f"{len(at_default)} other settings at their defaults" if chosen else "All settings are the defaults"
        parts.append(folded(summary, table(header, at_default)))
    return "\n\n".join(parts)


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
        ("weights of linear layers", "merged as whole matrices", report.by_matrix),
        (others, how, report.by_neuron),
        ("vectors (biases, norms) and scalars", "merged entry by entry", report.by_entry),
        ("all others", "unchanged (copied from the base)", report.from_base),
    ]
    rows = [[what, fate, f"{len(found.names):,}", f"{found.entries:,}"] for what, fate, found in classes if found.names]
    if report.head:
        rows.append(["head that the base lacks", "a mean of the experts'", f"{len(report.head):,}", ""])
    heads = {expert.name: expert.head for expert in report.experts if expert.head}
    for kept, fate in (
        ({name: head for name, head in heads.items() if name == report.loaded_head}, "in the weights, as it was"),
        ({} if report.loaded_head else heads, "kept apart, in `heads/`"),
        ({name: head for name, head in heads.items() if report.loaded_head not in (None, name)}, "left out"),
    ):
        if kept:
            count = f"{sum(map(len, kept.values())):,}"
            rows.append([f"heads that the base lacks: {_names(list(kept))}", fate, count, ""])
    for name, owner in report.tied.items():
        rows.append([f"tied: {code(name)}", f"shares {code(owner)}", "1", ""])
    for name in report.untied:
        rows.append([f"tied in the base: {code(name)}", "has weights of its own now", "1", ""])
    return table(["parameters", "in the merged model", "tensors", "numbers"], rows)


def unchanged(card: MergeCard) -> str:
    """The names of the parameters that were copied from the base, with ``*`` for numbers, folded away."""
    kinds = Counter(kind_of(name) for name in card.report.from_base.names)
    if not kinds:
        return ""
    names = [f"* {code(kind)}{f' ({count:,})' if count > 1 else ''}" for kind, count in kinds.items()]
    more = [f"* and {len(names) - LISTED_KINDS:,} more kinds"] if len(names) > LISTED_KINDS else []
    return folded("Unchanged parameters", "\n".join([*names[:LISTED_KINDS], *more]))


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
            percent(kind.lost, 2),
            "" if kind.cosine is None else f"{kind.cosine:.4f}",
            f"{kind.norm_ratio:.4f}",
        ]
        for kind in [found.model, *kinds[:SHOWN]]
    ]
    return table([f"rounded to {found.dtype}", "lost", "cosine", "norm, of the merged change's"], rows)


def changes(card: MergeCard) -> str:
    """Each expert's task vector: its norm, what trimming kept, what sign conflicts cost, and what the merge kept."""
    found = card.report.diagnostics
    assert found is not None, "the template asks only where there are some"
    columns = {
        "expert": [code(expert.name) for expert in found.experts],
        "change": [_share(expert.relative_norm, 2) for expert in found.experts],
    }
    if found.elected:
        columns["after trimming"] = [_share(expert.norm_kept) for expert in found.experts]
        columns["lost to sign conflicts"] = [_share(expert.outvoted_orthogonal) for expert in found.experts]
    columns["kept"] = [_share(expert.survival) for expert in found.experts]
    return table(list(columns), zip(*columns.values(), strict=True))


def cosines(card: MergeCard) -> str:
    """The cosines between the experts' task vectors, folded away."""
    found = card.report.diagnostics
    assert found is not None, "the template asks only where there are some"
    names = [code(expert.name) for expert in found.experts]
    rows = [
        [name, *("" if value is None else decimal(value, 3) for value in values)]
        for name, values in zip(names, found.cosines, strict=True)
    ]
    return folded("Cosines between the experts' changes", table(["", *names], rows))


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else percent(value, digits)


def results(card: MergeCard) -> str:
    """Scores of the base, the experts and the merged model, and the share of the best expert's score that it retains.

    If each task was measured with one expert only, as with heads of their own, the experts share a column. The last row
    has the averages, if all scores are of one metric.
    """
    experts = [expert.name for expert in card.report.experts]
    found = comparisons(card.report.results)
    alone = all(len(each.experts) <= 1 for each in found)
    rows = []
    for each in found:
        of_experts = [_score(each.results.get(name)) for name in experts]
        if alone:
            of_experts = [f"{_score(result)} ({code(name)})" for name, result in each.experts.items()] or [""]
        what = [escaped(each.task), escaped(each.metric), escaped(each.split or "")]
        models = each.results
        retained = _share(each.retained)
        rows.append([*what, _score(models.get(BASE)), *of_experts, _score(models.get(MERGED)), retained])
    columns = ["expert"] if alone else list(map(code, experts))
    average = _averages(found, None if alone else experts)
    return table(["task", "metric", "split", BASE, *columns, MERGED, "retained"], rows + average)


def _averages(found: Sequence[Comparison], experts: Sequence[str] | None) -> list[list[str]]:
    """A row with the average of each column that has a score of every task. The experts share one if they are None."""
    if len(found) < 2 or len({each.metric for each in found}) > 1:
        return []
    columns: list[list[Result]] = [[each.results[BASE] for each in found if BASE in each.results]]
    if experts is None:
        columns.append([result for each in found for result in each.experts.values()])
    else:
        columns += [[each.results[name] for each in found if name in each.results] for name in experts]
    columns.append([each.merged for each in found if MERGED in each.results])
    means = [fmean(result.value for result in column) if len(column) == len(found) else None for column in columns]
    if means[-1] is None:
        return []
    cells = ["" if mean is None else f"**{mean:.4g}**" for mean in means]
    comparable = experts is None and means[1] and all(each.retained is not None for each in found)
    retained = f"**{percent(means[-1] / means[1], 1)}**" if comparable and means[1] else ""
    return [["**average**", "", "", *cells, retained]]


def _score(result: Result | None) -> str:
    return "" if result is None else f"{result.value:.4g}"


def environment(card: MergeCard) -> str:
    """The software versions and the hardware of the merge, folded away."""
    rows = [[escaped(name), escaped(value)] for name, value in card.report.environment.items()]
    return folded("Software and hardware of the merge", table(["", "version"], rows))


def weights(card: MergeCard) -> str:
    """The sha256 of every weight file, folded away."""
    rows = [[code(name), code(digest)] for name, digest in sorted(card.report.weights.items())]
    return folded("Hashes of the weights", table(["file", "sha256"], rows))
