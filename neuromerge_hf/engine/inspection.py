"""The inspecting pass: what each expert changed and where they collide, without a merge."""

import dataclasses
import heapq
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from neuromerge_hf.engine.block_statistics import BlockStatistics, conflicts_of_neurons, sum_entries, sum_neurons
from neuromerge_hf.engine.blocks import load_block
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.statistics import StatisticsCollector
from neuromerge_hf.folder.diagnostics import Diagnostics, NeuronDiagnostics
from neuromerge_hf.kernel import gram_matrix, hold_election
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.spectrum import effective_rank, make_probes
from neuromerge_hf.storage.layout import Block

NEURONS = 10
"""How many of the neurons that collide most are named."""

Found = tuple[BlockStatistics, Tensor, Tensor, Block]
"""The statistics of a block, its conflicts by neuron, (3, neurons), its products with the probes, (T, width, PROBES),
and the block."""


def inspect_units(passes: Passes) -> Diagnostics:
    """Measure the untrimmed task vectors of all experts, and return their diagnostics, without those of a merge.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    collector = StatisticsCollector(passes.work)
    ranks: dict[str, list[float | None]] = {}
    neurons: list[tuple[float, str, int, float, float, float]] = []
    shared = {}

    def start(unit: Unit) -> tuple[Iterable[Block], Callable[[Block], Found]]:
        probes = make_probes(unit.layout.width, passes.device)
        return passes.blocks(unit), lambda block: _measure(passes, unit, block, probes)

    for unit, results in passes.run(start, passes.work.merged):
        sketch: dict[int, Tensor] = {}
        energy: dict[int, Tensor] = {}
        total = 0.0
        for sums, conflicts, products, block in results:
            collector.add(unit, sums)
            if not unit.is_neuronal:
                continue
            sketch[block.batch] = products + sketch.get(block.batch, 0.0)
            energy[block.batch] = sums.gram.diagonal()[1:] + energy.get(block.batch, 0.0)
            total += conflicts[0].sum().item()
            _add_neurons(neurons, unit, block, conflicts)
        if sketch:
            ranks[unit.parameter] = _ranks(unit, energy, sketch, len(passes.work.expert_names))
            shared[unit.parameter] = total
    found = collector.diagnostics(None, merges=False)
    return dataclasses.replace(
        found,
        parameters=[dataclasses.replace(each, effective_ranks=ranks[each.name]) for each in found.parameters],
        neurons=[
            NeuronDiagnostics(name, number, *(round(value, 6) for value in (at / of, chance / of, of / shared[name])))
            for _, name, number, of, at, chance in sorted(neurons, reverse=True)
        ],
    )


def _measure(passes: Passes, unit: Unit, block: Block, probes: Tensor) -> Found:
    if unit.is_neuronal and (kernel := passes.kernel):
        stored = kernel.load(unit, block, passes.memory)
        gram = kernel.gram_matrix(stored, [0.0] * (len(stored) - 1))
        task_vectors: Iterable[Tensor] = kernel.task_vectors(stored)
    else:
        x = load_block(unit, block, passes.memory, passes.device)
        if not unit.is_neuronal:
            return sum_entries(x[:, 0], x[0, 0]), torch.empty(0), torch.empty(0), block
        gram, task_vectors = gram_matrix(x.transpose(0, 1)), x[1:]
    election = hold_election(gram, 0.0, 0.0)
    products = torch.stack([rows.T @ (rows @ probes) for rows in task_vectors])
    return sum_neurons(election), conflicts_of_neurons(election).cpu(), products.double().cpu(), block


def _add_neurons(
    kept: list[tuple[float, str, int, float, float, float]], unit: Unit, block: Block, conflicts: Tensor
) -> None:
    """Keep the neurons that collide most in a heap of `NEURONS`."""
    shared, conflicting, by_chance = conflicts
    excess = conflicting - by_chance
    first = block.batch * unit.layout.neurons + block.start
    for value, place in zip(*(each.tolist() for each in excess.topk(min(NEURONS, len(excess)))), strict=True):
        sums = shared[place].item(), conflicting[place].item(), by_chance[place].item()
        entry = (value, unit.parameter, first + place, *sums)
        if value > 0 and len(kept) < NEURONS:
            heapq.heappush(kept, entry)
        elif value > 0:
            heapq.heappushpop(kept, entry)


def _ranks(unit: Unit, energy: dict[int, Tensor], sketch: dict[int, Tensor], experts: int) -> list[float | None]:
    """Return the effective rank of each expert's task vector: the mean over the matrices that it changes."""
    probes = make_probes(unit.layout.width, torch.device("cpu"))
    ranks: list[float | None] = [None] * experts
    for place, expert in enumerate(unit.changing):
        pairs = ((energy[batch][place].item(), sketch[batch][place]) for batch in sketch)
        found = [rank for own, products in pairs if (rank := effective_rank(own, probes, products)) is not None]
        ranks[expert] = float(f"{sum(found) / len(found):.3g}") if found else None
    return ranks
