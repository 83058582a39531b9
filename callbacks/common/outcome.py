"""What a callback made: where the merged model is, and how good it is."""

from dataclasses import dataclass

from neuromerge_hf.callbacks.common.places import Places
from neuromerge_hf.config import config_class
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.text import listed


@dataclass(frozen=True)
class Outcome:
    """A finished merge of a training. `str` tells about it in one sentence.

    Attributes:
        places: the folders of its models.
        report: the report on the merge.
        metrics: the metrics of the evaluation by the names under which they are logged.
        shown: the names of the metrics that the sentence tells.
    """

    places: Places
    report: MergeReport
    metrics: dict[str, float]
    shown: tuple[str, ...]

    def __str__(self) -> str:
        report, names = self.report, [expert.name for expert in self.report.experts]
        rule = "" if report.lambda_orthogonal is None else f" (lambda_2 = {report.lambda_orthogonal:.4g})"
        measured = [f"{name} {self.metrics[name]:.4g}" for name in self.shown if name in self.metrics]
        parts = [
            f"Merged {listed(names)} into {report.base_model} by {config_class(report.method).title}{rule}",
            f"saved in {self.places.merged}",
            *([", ".join(measured)] if measured else []),
        ]
        return "; ".join(parts) + "."
