"""The report of a finished merge."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from neuromerge_hf.engine.method import Method
from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.recipe import PACKAGES
from neuromerge_hf.folder.report import ExpertReport, MergeReport, ParameterReport
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit


def make_report(
    plan: MergePlan,
    method: Method[Any],
    diagnostics: Diagnostics | None,
    output_dir: Path,
    seconds: float,
    device: torch.device,
    tuned_on: str | None = None,
) -> MergeReport:
    """The report of a finished merge."""
    neuronal = method if isinstance(method, NeuroMerging) else None
    settings = plan.config.to_dict()
    if neuronal:
        settings["lambda_orthogonal"] = neuronal.lambda_orthogonal
    experts = [
        ExpertReport(
            name=expert.name,
            id=expert.location.public_name,
            kind=expert.kind,
            model_class=expert.model_class_name,
            entries=trimming.entries,
            threshold=trimming.threshold,
            sigma=trimming.sigma if neuronal else None,
            head=sorted(expert.head.tensors) if expert.head else [],
            ignored=expert.ignored,
        )
        for expert, trimming in zip(plan.experts, method.trimmings, strict=True)
    ]
    merged = [unit for unit in plan.units if unit.task_vectors]
    return MergeReport(
        output_dir=output_dir,
        base_model=plan.base.location.public_name,
        experts=experts,
        density=settings.get("density"),
        sigma=neuronal.sigma if neuronal else None,
        lambda_parallel=neuronal.config.lambda_parallel if neuronal else None,
        lambda_orthogonal=neuronal.lambda_orthogonal if neuronal else None,
        by_neuron=_parameters(unit for unit in merged if unit.is_neuronal),
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
        diagnostics=diagnostics,
        method=method.config.method,
        settings=settings,
        tuned_on=tuned_on,
        environment=_environment(device, plan.threads),
        notes=[note for expert in plan.experts for note in expert.notes],
        parents=[Parent.of(location) for location in (plan.base.location, *(each.location for each in plan.experts))],
    )


def _parameters(units: Iterable[Unit]) -> ParameterReport:
    units = list(units)
    return ParameterReport([unit.parameter for unit in units], sum(unit.entries for unit in units))


def _environment(device: torch.device, threads: int) -> dict[str, str]:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type} with {threads} threads ({platform.machine()})"
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": hardware,
    }
