"""What a merge did."""

from dataclasses import dataclass, field
from pathlib import Path

from neuromerge_hf.plan import MergePlan, VocabularyReport, readable_size
from neuromerge_hf.trim import Trimming


@dataclass(frozen=True)
class ExpertReport:
    """One expert of a merge.

    Attributes:
        name: by which `AutoMergedModel.from_pretrained(..., head=name)` finds its head.
        id: the folder or the id on the Hub, with the commit.
        kind: "full", or the kind of adapter.
        entries: how many entries its task vector has.
        threshold: the magnitude below which they were trimmed.
        sigma: the share of the task vector's L1 norm that was trimmed.
        head: the names of its own parameters, kept unmerged.
        ignored: tensors of its files that its model class does not know.
    """

    name: str
    id: str
    kind: str
    entries: int
    threshold: float
    sigma: float
    head: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `str()` gives it in a few lines.

    Attributes:
        output_dir: where the merged model is.
        base_model: the base's folder or id, with the commit.
        sigma: the largest of the experts' sigmas.
        lambda_orthogonal: the paper's lambda_2 as it was used.
        merged: names of the parameters that were merged.
        copied: names of the parameters and buffers that are the base's.
        head: names of the parameters that are the mean of the experts' own.
        vocabulary: how tokens were aligned; None where all models have the same.
        seconds: wall time of the merge, downloads not counted.
        bytes_read: how much of the inputs was read.
        bytes_written: the size of the merged weights, and of the heads beside them.
        notes: what else is worth knowing of the experts.
    """

    output_dir: Path
    base_model: str
    experts: list[ExpertReport]
    density: float
    sigma: float
    lambda_parallel: float
    lambda_orthogonal: float
    merged: list[str]
    copied: list[str]
    seconds: float
    bytes_read: int
    bytes_written: int
    notes: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    vocabulary: VocabularyReport | None = None

    def __str__(self) -> str:
        experts = "1 expert" if len(self.experts) == 1 else f"{len(self.experts)} experts"
        lines = [f"Merged {experts} into {self.base_model}:"]
        for expert in self.experts:
            head = f", own head kept: {', '.join(expert.head)}" if expert.head else ""
            lines.append(f"  {expert.name} ({expert.kind}): {expert.entries:,} entries, sigma {expert.sigma:.3f}{head}")
        lines += [
            f"  density {self.density:g}, sigma {self.sigma:.4f}, lambda_parallel {self.lambda_parallel:g}, "
            f"lambda_orthogonal {self.lambda_orthogonal:.4f}",
            f"  {len(self.merged)} parameters merged, {len(self.copied)} copied from the base",
            *([f"  heads merged by their mean: {', '.join(self.head)}"] if self.head else []),
            *([f"  {self.vocabulary}"] if self.vocabulary else []),
            f"  {self.seconds:.1f} s, {readable_size(self.bytes_read)} read, "
            f"{readable_size(self.bytes_written)} written",
            *(f"  Note: {note}" for note in self.notes),
            f"The merged model is in {self.output_dir}",
        ]
        return "\n".join(lines)


def make_report(
    plan: MergePlan, trimmings: list[Trimming], lambda_orthogonal: float, output_dir: Path, seconds: float
) -> MergeReport:
    """The report of a finished merge."""
    experts = [
        ExpertReport(
            name=expert.name,
            id=str(expert.location),
            kind=expert.kind,
            entries=trimming.entries,
            threshold=trimming.threshold,
            sigma=trimming.sigma,
            head=sorted(expert.head.tensors) if expert.head else [],
            ignored=expert.ignored,
        )
        for expert, trimming in zip(plan.experts, trimmings, strict=True)
    ]
    return MergeReport(
        output_dir=output_dir,
        base_model=str(plan.base.location),
        experts=experts,
        density=plan.config.density,
        sigma=max(trimming.sigma for trimming in trimmings),
        lambda_parallel=plan.config.lambda_parallel,
        lambda_orthogonal=lambda_orthogonal,
        merged=plan.merged,
        copied=plan.copied,
        seconds=seconds,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        notes=[note for expert in plan.experts for note in expert.notes],
        head=sorted(plan.head.tensors) if plan.head else [],
        vocabulary=plan.vocabulary,
    )
