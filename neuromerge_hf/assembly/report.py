"""Makes the report on a finished merge."""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuromerge_hf.engine.base_check import BaseCheck
from neuromerge_hf.engine.method import Method
from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.recipe import versions
from neuromerge_hf.folder.report import ExpertReport, MergeReport, ParameterReport
from neuromerge_hf.folder.rounding import Rounding
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit


@dataclass(frozen=True)
class WrittenWeights:
    """What was found while the merged weights were written.

    Attributes:
        method: the fitted method.
        diagnostics: the statistics of the task vectors and of the merge.
        hashes: the sha256 of each weight file.
        base_checks: how each expert relates to the base.
        rounding: what rounding left of the merged change.
        warnings: what the user should know and can mend.
        kernel: the library that computed them, "numba" or "torch".
    """

    method: Method[Any]
    diagnostics: Diagnostics
    hashes: dict[str, str]
    base_checks: list[BaseCheck | None]
    rounding: Rounding | None
    warnings: list[str]
    kernel: str


def make_report(
    plan: MergePlan,
    written: WrittenWeights,
    weights: dict[str, str],
    parents: list[Parent],
    output_dir: Path,
    seconds: float,
    device: torch.device,
) -> MergeReport:
    """Return the report on a finished merge.

    Args:
        plan: the plan that was carried out.
        written: what was found while the weights were written.
        weights: the sha256 of each weight file, by its path in the folder.
        parents: the metadata from the cards of the base and then of the experts.
        output_dir: the directory of the merged model.
        seconds: the wall time of the merge.
        device: the device that computed it.
    """
    method, rounding = written.method, written.rounding
    settings = method.settings()
    experts = [
        ExpertReport(
            name=expert.name,
            id=expert.location.public_name,
            kind=expert.kind,
            model_class=expert.model_class_name,
            entries=trimming.entries,
            threshold=trimming.threshold,
            sigma=None if method.sigma is None else trimming.sigma,
            head=sorted(expert.head.tensors) if expert.head else [],
            ignored=expert.ignored,
            relative_norm=check.relative_norm if check else None,
            along_base=check.along_base if check else None,
        )
        for expert, trimming, check in zip(plan.experts, method.trimmings, written.base_checks, strict=True)
    ]
    merged = [unit for unit in plan.units if unit.task_vectors]
    return MergeReport(
        output_dir=output_dir,
        base_model=plan.base.location.public_name,
        experts=experts,
        density=settings.get("density"),
        sigma=method.sigma,
        lambda_parallel=settings.get("lambda_parallel"),
        lambda_orthogonal=settings.get("lambda_orthogonal"),
        by_matrix=_parameters(unit for unit in merged if unit.by_matrix),
        by_neuron=_parameters(unit for unit in merged if unit.is_neuronal and not unit.by_matrix),
        by_entry=_parameters(unit for unit in merged if not unit.is_neuronal),
        from_base=_parameters(plan.copied_units),
        seconds=round(seconds, 1),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        head=sorted(plan.head.tensors) if plan.head else [],
        tied=plan.base.skeleton.ties,
        untied=sorted(plan.base.copies),
        tokenizer=plan.tokenizer.location.public_name if plan.tokenizer.has_files else None,
        vocabulary=plan.vocabulary,
        diagnostics=written.diagnostics,
        method=method.config.method,
        settings=settings,
        tuned_on=plan.spec.tuned_on,
        environment=_environment(device, plan.threads, written.kernel),
        notes=plan.notes + written.warnings,
        weights=weights,
        parents=parents,
        rounding=rounding,
    )


def _parameters(units: Iterable[Unit]) -> ParameterReport:
    units = list(units)
    return ParameterReport([unit.parameter for unit in units], sum(unit.entries for unit in units))


def _environment(device: torch.device, threads: int, kernel: str) -> dict[str, str]:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type} with {threads} threads ({platform.machine()})"
    return {
        **versions(kernel),
        "python": platform.python_version(),
        "device": hardware,
        "kernel": kernel,
    }
