"""Estimates of what a merge costs: bytes, memory and time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine.histogram import BINS
from neuromerge_hf.engine.passes import BLOCK_ENTRIES
from neuromerge_hf.engine.sample import SAMPLE_ENTRIES, sample_factor
from neuromerge_hf.kernel import ALIGNMENT
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.files import companion_files, licence_files, tokenizer_files
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.sentence_modules import module_files

START_MEMORY = 300_000_000
"""The memory of Python, torch and transformers, in bytes."""

START_SECONDS = 6
"""The time to load torch and transformers, in seconds."""

VALUES_PER_SECOND = {"numba": 300_000_000, "torch": 150_000_000}
"""How many entries of the base and of task vectors a thread processes: 260 to 440 and 130 to 210 million, measured."""


SPECTRUM_SECONDS = 1.8e-10, 5.4e-10
"""The time that a thread needs to merge a matrix (m, n), m >= n, by its spectrum: seconds for each of m n^2 and n^3.

It is that of a merge of 1.1 B parameters on two busy cores. A spectrum alone takes little more than half of it.
"""


CARD_BYTES = 500_000
"""About the size of the card, its picture, the report and the recipe, in bytes."""


def companion_bytes(
    base: Location, tokenizer: Location, models: Iterable[Location], modules: Location | None = None
) -> int:
    """Return the size of the files beside the weights: companions, licences, modules, and about that of the card."""
    files = {*companion_files(base.folder), *tokenizer_files(tokenizer.folder)}
    files |= {*module_files(modules.folder)} if modules else set()
    files |= {path for model in models for path in licence_files(model.folder)}
    return CARD_BYTES + sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class Costs:
    """What a merge costs.

    Attributes:
        bytes_to_download: the size of the weight files that are not in the Hub's cache yet.
        bytes_beside: the size of tokenizer, licences and other files that are copied, and about that of the card.
        bytes_read: the bytes that all passes read, without the samples that predict the thresholds and without hashing.
        bytes_written: the size of the merged weights and of the heads beside them.
        disk: the size of all files that are downloaded, written, or kept beside the output for a time, in bytes.
        memory: an estimate of the private memory on the CPU, in bytes.
        seconds: a rough estimate of the time on a CPU, without the download.
    """

    bytes_to_download: int
    bytes_beside: int
    bytes_read: int
    bytes_written: int
    disk: int
    memory: int
    seconds: float


def estimate(
    units: Sequence[Unit],
    experts: Sequence[Expert],
    config: MergeConfig,
    threads: int,
    bytes_to_download: int,
    bytes_beside: int,
    kernel: str,
) -> Costs:
    """Estimate the costs of merging units with the method of `config` on a number of threads."""
    passes = _passes(units, config)
    written = sum(unit.nbytes for unit in units) + sum(_head_bytes(experts))
    temporary = sum(expert.computed.nbytes for expert in experts if expert.computed)
    return Costs(
        bytes_to_download=bytes_to_download,
        bytes_beside=bytes_beside,
        bytes_read=sum(unit.bytes_read * (passes if unit.task_vectors else 1) for unit in units),
        bytes_written=written,
        disk=bytes_to_download + bytes_beside + written + temporary,
        memory=_memory(units, experts, config, threads),
        seconds=_seconds(units, passes, VALUES_PER_SECOND[kernel] * threads) + _spectra_seconds(units, config, threads),
    )


def _passes(units: Sequence[Unit], config: MergeConfig) -> int:
    """How many passes read the task vectors. Where all are merged as whole matrices, there is nothing to trim."""
    only_matrices = all(unit.by_matrix for unit in units if unit.task_vectors)
    return 1 if config.by_matrix and only_matrices else config.passes


def _memory(units: Sequence[Unit], experts: Sequence[Expert], config: MergeConfig, threads: int) -> int:
    """Estimate the private memory of a merge on the CPU, in bytes. Mapped files do not count: the kernel may drop them.

    The libraries and the factors of one tensor's LoRA adapters are counted. Each thread holds a block of the base and
    of T experts in float32, an input buffer (8 bytes an entry), the merged (4) and the written block (4), and a padded
    copy if neurons do not fill whole cache lines, and what the method says that it needs. Finding thresholds takes a
    histogram and a sample for each expert, and two copies of one sample while it is sorted. The largest head is in
    memory while it is written. Where matrices are merged whole, each thread holds one; see `_matrix_memory`. The memory
    that PEFT needs to compute an adapter's weights is not counted.
    """
    thresholds = 0
    if config.finds_thresholds and _passes(units, config) > 1:
        sample = sample_factor(units) * SAMPLE_ENTRIES
        thresholds = len(experts) * (8 * BINS + 4 * sample) + 8 * sample
    blocks = threads * (max(map(_block_memory, units)) + BLOCK_ENTRIES * config.bytes_per_entry)
    blocks += threads * max((_matrix_memory(unit, config) for unit in units if unit.by_matrix), default=0)
    return START_MEMORY + _factor_bytes(units) + thresholds + blocks + max(_head_bytes(experts), default=0)


def _seconds(units: Sequence[Unit], passes: int, values_per_second: int) -> float:
    """Estimate the time of a merge on a CPU without the download, in seconds. It is very rough, as machines differ.

    Each pass processes every entry of the base and of the T experts that change it.
    """
    merged = sum(unit.entries * (1 + len(unit.changing)) for unit in units if unit.task_vectors)
    copied = sum(unit.entries for unit in units if not unit.task_vectors)
    return START_SECONDS + (passes * merged + copied) / values_per_second


def _block_memory(unit: Unit) -> int:
    entries = min(unit.layout.rows, max(1, BLOCK_ENTRIES // max(1, unit.layout.width))) * unit.layout.width
    rows = 4 * (1 + len(unit.changing))
    padded = unit.is_neuronal and unit.layout.width % (ALIGNMENT // 4) != 0
    return entries * (rows * (1 + padded) + 8 + 4 + 4) if unit.task_vectors else entries * unit.dtype.itemsize


def _matrix_memory(unit: Unit, config: MergeConfig) -> int:
    """Estimate the memory in which one matrix is merged: itself and its spectrum twice in float64, and the result."""
    rows, columns = unit.layout.matrix, unit.layout.width
    spectrum = _rank(unit) or min(rows, columns)
    held = 0 if _rank(unit) else rows * columns * 4
    vectors = 8 * spectrum * (rows + columns) * (2 if config.spectra(2) > 1 or _rank(unit) else 0)
    return held + 5 * 8 * spectrum**2 + vectors + rows * columns * (4 + 4 + unit.dtype.itemsize)


def _spectra_seconds(units: Sequence[Unit], config: MergeConfig, threads: int) -> float:
    """Estimate the time for the spectra of full matrices. Those of LoRA adapters take hardly any."""
    seconds = 0.0
    for unit in units:
        if unit.by_matrix and not _rank(unit):
            short, long = sorted((unit.layout.matrix, unit.layout.width))
            one = SPECTRUM_SECONDS[0] * long * short**2 + SPECTRUM_SECONDS[1] * short**3
            seconds += unit.layout.rows // unit.layout.matrix * one * config.spectra(len(unit.changing))
    return seconds / threads


def _rank(unit: Unit) -> int:
    """Return the sum of the ranks if only LoRA adapters change a unit, else 0."""
    ranks = [vector.rank for vector in unit.task_vectors if vector]
    return min(sum(ranks), unit.layout.width) if all(ranks) else 0


def _factor_bytes(units: Sequence[Unit]) -> int:
    """Return the largest size of the LoRA factors of one tensor in float32. They are in memory while it is merged."""
    return max(
        4 * (unit.layout.rows + unit.layout.width) * sum(vector.rank for vector in unit.task_vectors if vector)
        for unit in units
    )


def _head_bytes(experts: Sequence[Expert]) -> list[int]:
    return [expert.head.nbytes for expert in experts if expert.head]
