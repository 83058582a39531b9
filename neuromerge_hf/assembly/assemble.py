"""Carries out a plan: writes weights, companions, heads, recipe, report and card to a folder."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import tqdm

from neuromerge_hf.assembly.companions import write_companions
from neuromerge_hf.assembly.report import WrittenWeights, make_report
from neuromerge_hf.engine.base_check import BaseCheck, check_bases
from neuromerge_hf.engine.cpu_kernel import find_kernel
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.engine.merge import merge_weights
from neuromerge_hf.engine.method import fit_method, is_elected
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.rounding import RoundingCollector
from neuromerge_hf.engine.statistics import StatisticsCollector
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.folder.assets import hash_beside
from neuromerge_hf.folder.directory import atomic_directory
from neuromerge_hf.folder.inputs import InputHasher, unchanged_inputs
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.recipe import Recipe
from neuromerge_hf.folder.replaceable import list_files, previous_card
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.model_cards import write_card
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.spec import Runtime
from neuromerge_hf.storage.files import HEADS

logger = logging.getLogger(__name__)


def assemble(
    plan: MergePlan,
    target: Path,
    runtime: Runtime,
    inputs: InputHasher,
    add: Callable[[Path], object] = lambda folder: None,
) -> MergeReport:
    """Carry out a plan. The output directory appears once it is complete.

    If it replaces an earlier merge, what people wrote into that merge's card is kept.

    Args:
        plan: a plan whose files are all on this machine.
        target: the absolute path of the output directory.
        runtime: how to run the merge.
        inputs: the hasher of the plan's models, for the recipe.
        add: writes further files into the folder.

    Returns:
        The report on the merge.

    Raises:
        MergeError: if the models cannot be merged, or a file has changed since the plan. No files are left behind.
    """
    device = find_device(runtime.device)
    with atomic_directory(target, runtime.overwrite) as folder, unchanged_inputs(plan.locations):
        # What can fail for other reasons than weights comes first, so that nobody waits for it.
        write_companions(plan, folder, runtime.trust_remote_code)
        parents = [Parent.of(location) for location in plan.locations]
        started = time.perf_counter()
        temporary = folder / "computed"
        save_heads(plan, folder / HEADS)  # first: a damaged head is found before hours of merging
        compute_adapters(plan, temporary)
        written = _write_weights(plan, folder, device)
        seconds = time.perf_counter() - started
        shutil.rmtree(temporary)
        recipe = Recipe(plan.spec, inputs.base, inputs.models, written.kernel)
        recipe.save(folder)
        weights = written.hashes | hash_beside(folder)
        report = make_report(plan, written, weights, parents, target, seconds, device)
        report.save(folder)
        write_card(folder, name=target.name, recipe=recipe, previous=previous_card(target))
        add(folder)
        report = replace(report, files=list_files(folder))
        report.save(folder)
    return report


def compute_adapters(plan: MergePlan, folder: Path) -> None:
    """Compute the weights of adapters that need PEFT, and write them to files in a new folder."""
    folder.mkdir()
    for expert in plan.experts:
        if expert.computed:
            expert.computed.run(folder)


def save_heads(plan: MergePlan, folder: Path) -> None:
    """Save the experts' own heads, each in a folder with the expert's name.

    Raises:
        MergeError: if a weight of a head is NaN or infinite.
    """
    for expert in plan.experts:
        if expert.head:
            expert.head.save(folder / expert.name)


def _write_weights(plan: MergePlan, folder: Path, device: torch.device) -> WrittenWeights:
    """Write the merged weights. What the user should know is also logged at once, as a warning."""
    total = plan.costs.bytes_read
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, name="neuromerge_hf.merging") as bar:
        kernel = find_kernel(device, plan.units)
        passes = Passes(plan.work, device, plan.threads, bar.update, kernel=kernel)
        base_checks = check_bases(passes)
        warnings = foreign_warnings(plan, base_checks)
        for warning in warnings:
            logger.warning(warning)
        method = fit_method(plan.config, passes)
        writer = CheckpointWriter(folder, plan.units, plan.spec.max_shard_size, hashed=True)
        collector, roundings = StatisticsCollector(plan.work), RoundingCollector(plan.work)
        try:
            merge_weights(passes, method, writer, collector.add, roundings.add)
        finally:
            writer.close()
    diagnostics = collector.diagnostics(method.trimmings if is_elected(plan.config) else None)
    rounding = roundings.rounding()
    if rounding and rounding.warning:
        logger.warning(rounding.warning)
        warnings.append(rounding.warning)
    kernel_used = "numba" if kernel else "torch"
    return WrittenWeights(method, diagnostics, writer.hashes, base_checks, rounding, warnings, kernel_used)


def foreign_warnings(plan: MergePlan, checks: Sequence[BaseCheck | None]) -> list[str]:
    """Return a warning of each expert that was probably trained from another base."""
    return [
        f"{expert.location.public_name} is probably no fine-tune of {plan.base.location.public_name}: its change "
        f"contains {min(1.0, -check.along_base):.0%} of the base with a minus sign (a fine-tune's: hardly any), "
        f"and is {check.relative_norm:.2g} times as long as the base. Check base_model."
        for expert, check in zip(plan.experts, checks, strict=True)
        if check and check.is_foreign
    ]
