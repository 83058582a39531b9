"""The limits of a merged model: facts of this merge, and no general warnings."""

from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.markdown import code, escaped, sentence_list


def limits(card: MergeCard) -> list[str]:
    """Sentences in Markdown on the merged model's limits; an empty list if there are none."""
    report = card.report
    found = []
    if not report.results:
        found.append("The merged model has not been evaluated.")
    if card.head_start and card.task and card.task.auto_class == "AutoModel":
        found.append("On its own it only produces embeddings. Load an expert's head for its task.")
    if report.head:
        found.append("Its head is a plain mean of the experts' heads: the base has none, so there are no task vectors.")
    if report.vocabulary and report.vocabulary.from_experts:
        found.append(
            f"{report.vocabulary.from_experts:,} of its tokens are not in the base: their embeddings are a plain mean "
            "over the experts that have them."
        )
    for expert in report.experts:
        if expert.ignored:
            names = sentence_list([code(name) for name in expert.ignored])
            found.append(f"Left out, because the model class of {code(expert.name)} does not know them: {names}.")
    return [*found, *map(escaped, report.notes)]
