"""Merging only the weights of a plan, with passes of the test's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuromerge_hf import MergePlan
from neuromerge_hf.engine.merge import merge_weights
from neuromerge_hf.engine.method import Method, fit_method, is_elected
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.rounding import RoundingCollector
from neuromerge_hf.engine.statistics import StatisticsCollector
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.rounding import Rounding


@dataclass(frozen=True)
class MergedWeights:
    """The result of merging weights: files and hashes by file name, the fitted method, and what was measured."""

    files: dict[str, bytes]
    hashes: dict[str, str]
    method: Method[Any]
    diagnostics: Diagnostics
    rounding: Rounding | None


def merged_weights(plan: MergePlan, folder: Path, max_shard_size: str | int = "5GB", **options: Any) -> MergedWeights:
    """Merge on the CPU; `options` go to `Passes`."""
    folder.mkdir(parents=True)
    passes = Passes(plan.work, torch.device("cpu"), **options)
    method = fit_method(plan.config, passes)
    writer = CheckpointWriter(folder, plan.units, max_shard_size, hashed=True)
    collector, roundings = StatisticsCollector(plan.work), RoundingCollector(plan.work)
    try:
        merge_weights(passes, method, writer, collector.add, roundings.add)
    finally:
        writer.close()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    diagnostics = collector.diagnostics(method.trimmings if is_elected(plan.config) else None)
    return MergedWeights(files, writer.hashes, method, diagnostics, roundings.rounding())
