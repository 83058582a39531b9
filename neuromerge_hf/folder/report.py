"""What a merge did."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.diagnostics import Diagnostics, load_diagnostics
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.results import Result, check_results
from neuromerge_hf.text import different_names, readable_size

REPORT_NAME = "merge_report.json"


@dataclass(frozen=True)
class ExpertReport:
    """One expert of a merge.

    Attributes:
        name: by which `AutoMergedModel.from_pretrained(..., head=name)` finds its head.
        id: the id on the Hub with the commit, or the last part of the folder's path.
        kind: "full", or the kind of adapter.
        model_class: the architecture that it was trained as, if it says so.
        entries: how many entries its task vector has.
        threshold: the magnitude below which they were trimmed; with PCB-Merging, the score.
        sigma: the share of the task vector's L1 norm that was trimmed; None but for NeuroMerging.
        head: the names of its own parameters, kept unmerged.
        ignored: tensors of its files that its model class does not know.
    """

    name: str
    id: str
    kind: str
    model_class: str | None
    entries: int
    threshold: float
    sigma: float | None
    head: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ParameterReport:
    """What became of the parameters of one class.

    Attributes:
        names: the parameters, and buffers, by their names in the model.
        entries: how many numbers they hold.
    """

    names: list[str]
    entries: int


@dataclass(frozen=True)
class VocabularyReport:
    """How the tokens of models with different vocabularies were brought together.

    Attributes:
        tokens: how many the merged model has.
        rows: how many rows its embeddings have.
        aligned: how many of the tokens the base has.
        from_experts: how many the base lacks, so that they are the mean over the experts that have them.
        lacked: how many of the tokens each expert lacks, by its name.
        left_out: how many tokens of each expert the merged model lacks, by its name.
    """

    tokens: int
    rows: int
    aligned: int
    from_experts: int
    lacked: dict[str, int]
    left_out: dict[str, int]

    def __str__(self) -> str:
        notes = [f"{name} lacks {count:,}" for name, count in self.lacked.items() if count]
        notes += [f"{count:,} of {name} left out" for name, count in self.left_out.items() if count]
        return (
            f"vocabulary of {self.tokens:,} tokens in {self.rows:,} rows: {self.aligned:,} aligned with the base's, "
            f"{self.from_experts:,} from the experts" + "".join(f"; {text}" for text in notes)
        )


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `str()` gives it in a few lines, ``merge_report.json`` keeps it beside the merged weights.

    It names folders of this machine by the last part of their path alone, because it may be published.

    Attributes:
        output_dir: where the merged model is.
        base_model: the base's id on the Hub with the commit, or the last part of its folder's path.
        density: the fraction of each task vector that was kept; None for a method that trims nothing.
        sigma: the largest of the experts' sigmas; None but for NeuroMerging, like the lambdas.
        lambda_parallel: the paper's lambda_1.
        lambda_orthogonal: the paper's lambda_2 as it was used.
        by_neuron: the weights that were merged neuron by neuron.
        by_entry: the parameters that have no neurons (biases, norms), merged entry by entry.
        from_base: the parameters and buffers that are the base's.
        head: names of the parameters that are the mean of the experts' own.
        tied: parameters that share another's weights, with the name of that.
        untied: parameters that the base ties, and the merged model does not.
        tokenizer: whose tokenizer the merged model has, as `base_model`; None if it has none.
        vocabulary: how tokens were aligned; None where all models have the same.
        method: the name of the method.
        settings: its hyper-parameters, with what "auto" came to.
        tuned_on: what they were chosen on, if on data.
        seconds: wall time of the merge, downloads not counted.
        bytes_read: how much of the inputs was read.
        bytes_written: the size of the merged weights, and of the heads beside them.
        environment: versions of the packages, and the hardware.
        notes: what else is worth knowing of the experts.
        diagnostics: what their task vectors say.
        parents: what the cards of the base and then of the experts say about them.
        results: measurements, if there are any; see `add_results`.
        changed: whether the weights beside it are no longer the merge's: trained further, or edited.
        loaded_head: the expert whose head the weights beside it have, if they were saved with one.
    """

    output_dir: Path
    base_model: str
    experts: list[ExpertReport]
    density: float | None
    sigma: float | None
    lambda_parallel: float | None
    lambda_orthogonal: float | None
    by_neuron: ParameterReport
    by_entry: ParameterReport
    from_base: ParameterReport
    seconds: float
    bytes_read: int
    bytes_written: int
    head: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    vocabulary: VocabularyReport | None = None
    diagnostics: Diagnostics | None = None
    method: str = "neuromerging"
    settings: dict[str, Any] = field(default_factory=dict)
    tuned_on: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parents: list[Parent] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    changed: bool = False
    loaded_head: str | None = None

    @property
    def merged(self) -> list[str]:
        """Names of the parameters that were merged."""
        return sorted([*self.by_neuron.names, *self.by_entry.names])

    @property
    def copied(self) -> list[str]:
        """Names of the parameters and buffers that are the base's."""
        return self.from_base.names

    @property
    def model_names(self) -> list[str]:
        """Different names for the base and then the experts, as folders are called in what is published."""
        base = self.base_model.partition("@")[0].rpartition("/")[2]
        return different_names(base, [expert.name for expert in self.experts])

    def add_results(self, results: Iterable[Result | Mapping[str, Any]]) -> None:
        """Add measurements to the report and the card in `output_dir`; newer ones replace older ones of the same.

        Args:
            results: of the merged model ("merged"), of the base ("base"), or of an expert (its name).

        Raises:
            MergeError: if an entry is incomplete, is no finite number, or is of a model that is not in the merge.
        """
        from neuromerge_hf.model_cards import write_card  # which reads reports

        found = {(result.model, *result.measured): result for result in self.results}
        for result in check_results(results, [expert.name for expert in self.experts]):
            found[(result.model, *result.measured)] = result
        self.results[:] = found.values()
        self.save(self.output_dir)
        write_card(self.output_dir)

    def save(self, folder: Path) -> None:
        """Write ``merge_report.json``."""
        content = dataclasses.asdict(self)
        del content["output_dir"]
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    def __str__(self) -> str:
        experts = "1 expert" if len(self.experts) == 1 else f"{len(self.experts)} experts"
        lines = [f"Merged {experts} into {self.base_model}:"]
        for expert in self.experts:
            head = f", own head kept: {', '.join(expert.head)}" if expert.head else ""
            sigma = f", sigma {expert.sigma:.3f}" if self.sigma is not None else ""
            lines.append(f"  {expert.name} ({expert.kind}): {expert.entries:,} entries{sigma}{head}")
        lines += [
            f"  {self._hyper_parameters}{f', tuned on {self.tuned_on}' if self.tuned_on else ''}",
            f"  {len(self.merged)} parameters merged, {len(self.copied)} copied from the base",
            *([f"  heads merged by their mean: {', '.join(self.head)}"] if self.head else []),
            *([f"  {self.vocabulary}"] if self.vocabulary else []),
            f"  {self.seconds:.1f} s, {readable_size(self.bytes_read)} read, "
            f"{readable_size(self.bytes_written)} written",
            *([f"  {self.diagnostics.sentence}"] if self.diagnostics else []),
            *(f"  Note: {note}" for note in self.notes),
            f"The merged model is in {self.output_dir}",
        ]
        return "\n".join(lines)

    @property
    def _hyper_parameters(self) -> str:
        if self.sigma is None:
            values = [f", {name} {value:g}" for name, value in self.settings.items() if name != "exclude"]
            return f"method {self.method}{''.join(values)}"
        return (
            f"density {self.density:g}, sigma {self.sigma:.4f}, lambda_parallel {self.lambda_parallel:g}, "
            f"lambda_orthogonal {self.lambda_orthogonal:.4f}"
        )


def load_report(folder: Path) -> MergeReport:
    """The report that a merge saved.

    Raises:
        MergeError: if it is missing or damaged.
    """
    path = folder / REPORT_NAME
    lists = {"experts": ExpertReport, "parents": Parent, "results": Result}
    single = ("by_neuron", "by_entry", "from_base")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made: dict[str, Any] = {key: [kind(**entry) for entry in content.pop(key)] for key, kind in lists.items()}
        made |= {key: ParameterReport(**content.pop(key)) for key in single}
        vocabulary = content.pop("vocabulary")
        made["vocabulary"] = VocabularyReport(**vocabulary) if vocabulary else None
        diagnostics = content.pop("diagnostics")
        made["diagnostics"] = load_diagnostics(diagnostics) if diagnostics else None
        return MergeReport(output_dir=folder, **made, **content)
    except OSError as error:
        raise MergeError(
            f"{path} cannot be read ({error.strerror}). Give a directory that `neuromerge merge` wrote."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(f"{path} is not a report that `neuromerge merge` wrote ({error!r}).") from error
