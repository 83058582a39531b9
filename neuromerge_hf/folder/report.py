"""The report of a merge: what was merged, how, and what was measured."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromerge_hf.config import FIRST_METHOD
from neuromerge_hf.errors import MergeError, printable
from neuromerge_hf.folder.diagnostics import Diagnostics, load_diagnostics
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.results import Result, check_results, check_scales
from neuromerge_hf.folder.rounding import Rounding, load_rounding
from neuromerge_hf.storage.documents import load_json, reason_of
from neuromerge_hf.storage.writing import write_file
from neuromerge_hf.text import Summary, aligned, counted, decimal, different_names, percent, readable_size
from neuromerge_hf.typed import check_fields

REPORT_NAME = "merge_report.json"


@dataclass(frozen=True)
class ExpertReport:
    """One expert of a merge.

    Attributes:
        name: the expert's name, which selects its head in `AutoMergedModel.from_pretrained(..., head=name)`.
        id: the id on the Hub with the commit, or the last part of the folder's path.
        kind: "full", or the type of the adapter.
        model_class: the class that the expert was trained as; None if it names none.
        entries: the number of entries of its task vector.
        threshold: the magnitude below which entries were trimmed; for PCB-Merging, the score below which they were.
        sigma: the share of the task vector's L1 norm that was trimmed; None for methods that do not use it.
        head: the names of the expert's own parameters, which are kept unmerged.
        ignored: the names of tensors in its files that its model class does not have.
        relative_norm: the norm of its change divided by that of the base, before trimming, in a sample of the neurons;
            None for adapters.
        along_base: the regression coefficient of this change on the base: near 0 for a fine-tune of the base, near -1
            for a model that was trained from another base of the same shape; None for adapters.
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
    relative_norm: float | None = None
    along_base: float | None = None


@dataclass(frozen=True)
class ParameterReport:
    """The parameters that a merge treated in one way.

    Attributes:
        names: the names of the parameters and buffers in the model.
        entries: the number of their entries.
    """

    names: list[str]
    entries: int


@dataclass(frozen=True)
class VocabularyReport:
    """How the tokens of models with different vocabularies were aligned.

    Attributes:
        tokens: the number of tokens of the merged model.
        rows: the number of rows of its embeddings.
        aligned: the number of these tokens that the base has.
        from_experts: the number of tokens that the base lacks. Each is the mean over the experts that have it.
        lacked: the number of the merged model's tokens that an expert lacks, by the expert's name.
        left_out: the number of an expert's tokens that the merged model lacks, by the expert's name.
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


@dataclass(frozen=True, repr=False)
class MergeReport(Summary):
    """What a merge did. `str()` summarises it, and ``merge_report.json`` keeps it beside the merged weights.

    It may be published, so it names local folders only by the last part of their path.

    Attributes:
        output_dir: the folder of the merged model.
        base_model: the base's id on the Hub with the commit, or the last part of its folder's path.
        density: the fraction of each task vector that was kept; None for a method that trims nothing.
        sigma: the largest sigma of the experts. It and the lambdas are None for methods that have none.
        lambda_parallel: the paper's lambda_1.
        lambda_orthogonal: the value that was used for the paper's lambda_2.
        by_matrix: the weights of linear layers, if the method merges whole matrices.
        by_neuron: all other weights with neurons.
        by_entry: the parameters that have no neurons (biases, norms), merged entry by entry.
        from_base: the parameters and buffers that were copied from the base.
        head: the names of the head's parameters, if they are the mean of the experts' heads.
        tied: the tied parameters, each with the name of the parameter whose weights it shares.
        untied: the parameters that are tied in the base and not in the merged model.
        tokenizer: the model whose tokenizer was taken, written like `base_model`; None if there is no tokenizer.
        vocabulary: how the tokens were aligned; None if all models have the same vocabulary.
        method: the name of the method.
        settings: the method's hyper-parameters, with the values that replaced "auto".
        tuned_on: the validation data on which they were tuned; None if they were not tuned.
        seconds: the wall time of the merge in seconds, without downloads.
        bytes_read: the number of bytes that were read from the inputs.
        bytes_written: the size in bytes of the merged weights and of the heads beside them.
        environment: the versions of the packages, and the hardware.
        notes: further remarks on the experts.
        diagnostics: measurements of the task vectors and of their conflicts.
        parents: metadata from the cards of the base and then of the experts.
        weights: the sha256 of each weight file, by its path in the folder.
        files: the paths of all files that the merge wrote into its folder. `overwrite` deletes no others.
        results: measurements of the models; see `add_results`.
        changed: whether the weights in the folder were trained further or edited after the merge.
        loaded_head: the expert whose head was saved in the weights of the folder; None if there is none.
        rounding: what rounding to the dtype of the output left of the merged change; None if it was not rounded.

    Examples:
        >>> report = merge(["math", "code-lora"], "merged", base_model="base")
        >>> report.experts[1].kind
        'LoRA r=4'
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
    method: str = FIRST_METHOD
    settings: dict[str, Any] = field(default_factory=dict)
    tuned_on: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parents: list[Parent] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    changed: bool = False
    loaded_head: str | None = None
    by_matrix: ParameterReport = field(default_factory=lambda: ParameterReport([], 0))
    rounding: Rounding | None = None

    @property
    def merged(self) -> list[str]:
        """The names of the parameters that were merged, sorted."""
        return sorted([*self.by_matrix.names, *self.by_neuron.names, *self.by_entry.names])

    @property
    def copied(self) -> list[str]:
        """The names of the parameters and buffers that were copied from the base."""
        return self.from_base.names

    @property
    def model_names(self) -> list[str]:
        """Distinct names for the base and then the experts. Published texts use them for local folders."""
        base = self.base_model.partition("@")[0].rpartition("/")[2]
        return different_names(base, [expert.name for expert in self.experts])

    def with_results(self, results: Iterable[Result | Mapping[str, Any]]) -> "MergeReport":
        """A copy of the report with further measurements, which replace older ones of the same. See `add_results`.

        Raises:
            MergeError: if an entry is incomplete, its value is not a finite number, its model is not in the merge, or
                shares of 1 stand beside shares of 100.
        """
        found = {(result.model, *result.measured): result for result in self.results}
        for result in check_results(results, [expert.name for expert in self.experts]):
            found[(result.model, *result.measured)] = result
        check_scales(found.values())
        return dataclasses.replace(self, results=list(found.values()))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python objects, for JSON."""
        return {**dataclasses.asdict(self), "output_dir": str(self.output_dir)}

    def save(self, folder: Path) -> None:
        """Write ``merge_report.json`` into a folder."""
        content = self.to_dict()
        del content["output_dir"]
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_file(folder / REPORT_NAME, text + "\n")

    def __str__(self) -> str:
        experts = "1 expert" if len(self.experts) == 1 else f"{len(self.experts)} experts"
        lines = [
            f"Merged {experts} into {self.base_model} in {self.seconds:.1f} s: {readable_size(self.bytes_read)} read, "
            f"{readable_size(self.bytes_written)} written",
            "",
            *self._expert_lines(),
            "",
            f"{self._hyper_parameters}{f', tuned on {self.tuned_on}' if self.tuned_on else ''}",
            f"{counted(len(self.merged))} merged, {len(self.copied)} unchanged (copied from the base)",
            *([f"heads merged by their mean: {', '.join(self.head)}"] if self.head else []),
            *([f"{self.vocabulary}"] if self.vocabulary else []),
            *([self.diagnostics.verdict, self.diagnostics.details] if self.diagnostics else []),
            *([self.rounding.sentence] if self.rounding and not self.rounding.warning else []),
            *(f"Note: {note}" for note in self.notes),
            f"The merged model is in {self.output_dir}",
        ]
        return "\n".join(map(printable, lines))

    def _expert_lines(self) -> list[str]:
        """A table of the experts: the norm of each one's change as a share of the base's, and how much is kept."""
        rows = [["expert", "kind", "change", "kept", "sigma", "own head"]]
        found = self.diagnostics.experts if self.diagnostics else [None] * len(self.experts)
        for expert, measured in zip(self.experts, found, strict=True):
            change, kept = (measured.relative_norm, measured.survival) if measured else (None, None)
            rows.append(
                [
                    expert.name,
                    expert.kind,
                    "" if change is None else percent(change, 2),
                    "" if kept is None else percent(kept),
                    decimal(expert.sigma or 0.0, 3) if self.sigma else "",
                    f"kept in heads/{expert.name}" if expert.head else "",
                ]
            )
        return ["  " + line for line in aligned(rows)]

    @property
    def _hyper_parameters(self) -> str:
        if self.sigma is None or self.method != FIRST_METHOD:
            settings = {name: value for name, value in self.settings.items() if name != "exclude" and value is not None}
            values = [
                f", {n} {value:g}" if isinstance(value, float) else f", {n} {value}" for n, value in settings.items()
            ]
            return f"method {self.method}{''.join(values)}"
        return (
            f"density {self.density:g}, sigma {self.sigma:.4f}, lambda_parallel {self.lambda_parallel:g}, "
            f"lambda_orthogonal {self.lambda_orthogonal:.4f}"
        )


def load_report(folder: Path) -> MergeReport:
    """Read the report in the folder of a merge.

    Raises:
        MergeError: if the report is missing or damaged.
    """
    path = folder / REPORT_NAME
    lists = {"experts": ExpertReport, "parents": Parent, "results": Result}
    single = ("by_matrix", "by_neuron", "by_entry", "from_base")
    if not path.is_file():
        raise MergeError(
            f"{path} cannot be read: there is no such file. Give a directory that `neuromerge merge` wrote."
        )
    content = load_json(path)
    try:
        made: dict[str, Any] = {key: [kind(**entry) for entry in content.pop(key)] for key, kind in lists.items()}
        made |= {key: ParameterReport(**content.pop(key)) for key in single if key in content}  # by_matrix is new
        vocabulary = content.pop("vocabulary")
        made["vocabulary"] = VocabularyReport(**vocabulary) if vocabulary else None
        diagnostics = content.pop("diagnostics")
        made["diagnostics"] = load_diagnostics(diagnostics) if diagnostics else None
        rounding = content.pop("rounding", None)
        made["rounding"] = load_rounding(rounding) if rounding else None
        report = MergeReport(output_dir=folder, **made, **content)
        check_fields(report)
        return report
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = reason_of(error)
        raise MergeError(f"{path} is not a report that `neuromerge merge` wrote: {reason}.") from error
