"""Carries out a plan: writes weights, companions, heads, recipe, report and card to a folder."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm

from neuromerge_hf.assembly.companions import write_companions
from neuromerge_hf.assembly.report import make_report
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.engine.merge import merge_weights
from neuromerge_hf.engine.method import Method, fit_method
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.statistics import StatisticsCollector
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.folder.assets import hash_heads
from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.directory import atomic_directory
from neuromerge_hf.folder.inputs import InputHasher, unchanged_inputs
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.recipe import Recipe
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.model_cards import write_card
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.spec import Runtime
from neuromerge_hf.storage.files import HEADS


def assemble(plan: MergePlan, target: Path, runtime: Runtime, inputs: InputHasher) -> MergeReport:
    """Carry out a plan. The output directory appears once it is complete.

    Args:
        plan: a plan whose files are all on this machine.
        target: the absolute path of the output directory.
        runtime: how to run the merge.
        inputs: the hasher of the plan's models, for the recipe.

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
        method, diagnostics, hashes = _write_weights(plan, folder, device)
        seconds = time.perf_counter() - started
        shutil.rmtree(temporary)
        recipe = Recipe(plan.spec, inputs.base, inputs.models)
        recipe.save(folder)
        weights = hashes | hash_heads(folder)
        report = make_report(plan, method, diagnostics, weights, parents, target, seconds, device)
        report.save(folder)
        write_card(folder, name=target.name, recipe=recipe)
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


def _write_weights(
    plan: MergePlan, folder: Path, device: torch.device
) -> tuple[Method[Any], Diagnostics | None, dict[str, str]]:
    """Write the merged weights, and return the fitted method, its diagnostics, and the sha256 of each weight file."""
    total = plan.costs.bytes_read
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, name="neuromerge_hf.merging") as bar:
        passes = Passes(plan.work, device, plan.threads, bar.update)
        method = fit_method(plan.config, passes)
        writer = CheckpointWriter(folder, plan.units, plan.spec.max_shard_size, hashed=True)
        collector = StatisticsCollector(plan.work)
        try:
            merge_weights(passes, method, writer, collector.add)
        finally:
            writer.close()
    config = plan.config
    trimmings = None if config.by_matrix else method.trimmings
    diagnostics = collector.diagnostics(trimmings) if config.by_neuron or config.by_matrix else None
    return method, diagnostics, writer.hashes
