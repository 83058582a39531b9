"""The plan of a merge: the units to write, the tensors that they are made from, and the costs."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine.rounding import ROUNDED
from neuromerge_hf.errors import printable
from neuromerge_hf.folder.report import VocabularyReport
from neuromerge_hf.planning.costs import Costs
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.merged_head import MergedHead
from neuromerge_hf.sources.unit import Unit, Work
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.storage.finite import name_of
from neuromerge_hf.storage.location import Location
from neuromerge_hf.text import Summary, counted, different_names, listed, readable_size
from neuromerge_hf.vocabulary.tokenizer import TokenizerChoice


@dataclass(frozen=True, repr=False)
class MergePlan(Summary):
    """What a merge will do. `str` summarises it in a few lines.

    Attributes:
        spec: the spec that was planned.
        base: the opened base model.
        experts: the opened experts, in the user's order.
        units: a unit for every tensor that will be written, in the order of their names. All sums have this order.
        tokenizer: the choice of the tokenizer. The rows of `base` and of the experts are already in its order.
        costs: the bytes, the memory and the time that the merge needs.
        head: the merged head of the experts; None if their heads are kept apart.
        downloaded: the models whose weights were downloaded for the plan, because ``.bin`` files have no header.
        threads: the number of threads that compute.
        modules: the model that gives the files of a SentenceTransformer; None if no model is one.
        other_notes: remarks on repeated models, and on the modules of the models that do not give them.
        kernel: the library that computes the weights, "numba" or "torch".

    Examples:
        >>> plan = plan_merge(["math", "code-lora"], base_model="base")
        >>> plan.model_names
        ['base', 'math', 'code-lora']
    """

    spec: MergeSpec
    base: Base
    experts: tuple[Expert, ...]
    units: tuple[Unit, ...]
    tokenizer: TokenizerChoice
    costs: Costs
    head: MergedHead | None = None
    downloaded: tuple[str, ...] = ()
    threads: int = 1
    modules: Location | None = None
    other_notes: tuple[str, ...] = ()
    kernel: str = "torch"

    @property
    def work(self) -> Work:
        """The units and the experts' names, for the engine."""
        return Work(self.units, tuple(expert.name for expert in self.experts))

    @property
    def config(self) -> MergeConfig:
        """The method and its hyper-parameters."""
        return self.spec.config

    @property
    def dtype(self) -> str:
        """The name of the spec's dtype, or "auto" for each tensor's own."""
        return self.spec.dtype

    @property
    def merged(self) -> list[str]:
        """The parameters that at least one expert may change."""
        return [unit.parameter for unit in self.units if unit.task_vectors]

    @property
    def copied(self) -> list[str]:
        """The parameters and buffers that are copied from the base."""
        return [unit.parameter for unit in self.copied_units]

    @property
    def copied_units(self) -> list[Unit]:
        """The units that are copied from the base."""
        head = self.head.tensors if self.head else {}
        return [unit for unit in self.units if not unit.task_vectors and unit.tensor.name not in head]

    @property
    def locations(self) -> list[Location]:
        """The locations of the base and the experts, in this order."""
        return [self.base.location, *(expert.location for expert in self.experts)]

    @property
    def notes(self) -> list[str]:
        """Remarks on the base and the experts."""
        of_experts = [note for expert in self.experts for note in (*expert.location.notes, *expert.notes)]
        return [*self.base.location.notes, *of_experts, *self.other_notes]

    @property
    def model_names(self) -> list[str]:
        """Distinct names of the base and the experts, in this order."""
        return different_names(self.base.location.name, [expert.name for expert in self.experts])

    @property
    def architecture(self) -> str | None:
        """The class of the merged head, or the class that all experts share if none has its own head; else None."""
        if self.head:
            return self.head.model_class_name
        classes = {expert.model_class_name for expert in self.experts}
        if len(classes) == 1 and not any(expert.head for expert in self.experts):
            return classes.pop()
        return None

    @cached_property
    def vocabulary(self) -> VocabularyReport | None:
        """How tokens are aligned; None if all models have the same tokens."""
        alignment = self.tokenizer.alignment
        if alignment is None:
            return None
        tokens = alignment.target.tokens.keys()
        aligned = len(tokens & alignment.base.tokens.keys())
        theirs = {
            expert.name: vocabulary.tokens.keys()
            for expert, vocabulary in zip(self.experts, alignment.experts, strict=True)
        }
        return VocabularyReport(
            tokens=len(tokens),
            rows=alignment.target.rows,
            aligned=aligned,
            from_experts=len(tokens) - aligned,
            lacked={name: len(tokens - own) for name, own in theirs.items()},
            left_out={name: len(own - tokens) for name, own in theirs.items()},
        )

    @property
    def rounding(self) -> str | None:
        """What is known of rounding before weights are read; None if the merged weights are not rounded."""
        dtypes = {unit.dtype for unit in self.units if unit.task_vectors and unit.dtype in ROUNDED}
        if not dtypes:
            return None
        step = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
        return (
            f"rounded to {' and '.join(sorted(map(name_of, dtypes)))}: a change of less than {step:.2g} times a weight "
            f'may be lost; the report will say how much was, and dtype="float32" keeps all'
        )

    @property
    def bytes_to_download(self) -> int:
        """See `Costs`."""
        return self.costs.bytes_to_download

    @property
    def bytes_read(self) -> int:
        """See `Costs`."""
        return self.costs.bytes_read

    @property
    def bytes_written(self) -> int:
        """See `Costs`."""
        return self.costs.bytes_written

    @property
    def disk_needed(self) -> int:
        """See `Costs.disk`."""
        return self.costs.disk

    @property
    def memory_needed(self) -> int:
        """See `Costs.memory`."""
        return self.costs.memory

    @property
    def seconds_needed(self) -> float:
        """See `Costs.seconds`."""
        return self.costs.seconds

    def to_dict(self) -> dict[str, Any]:
        """What `str` tells, as plain Python objects, for JSON."""
        return {
            "spec": self.spec.to_dict(),
            "base_model": str(self.base.location),
            "experts": [
                {
                    "name": expert.name,
                    "kind": expert.kind,
                    "model": str(expert.location),
                    "parameters": sum(number in unit.changing for unit in self.units),
                    "head": sorted(expert.head.tensors) if expert.head else [],
                    "ignored": list(expert.ignored),
                }
                for number, expert in enumerate(self.experts)
            ],
            "merged": self.merged,
            "copied": self.copied,
            "tokenizer": str(self.tokenizer.location) if self.tokenizer.has_files else None,
            "vocabulary": asdict(self.vocabulary) if self.vocabulary else None,
            "costs": asdict(self.costs),
            "threads": self.threads,
            "kernel": self.kernel,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        experts = "1 expert" if len(self.experts) == 1 else f"{len(self.experts)} experts"
        lines = [f"{experts} into {self.base.location}:"]
        for number, expert in enumerate(self.experts):
            changed = sum(number in unit.changing for unit in self.units)
            lines.append(f"  {expert.name} ({expert.kind}), {expert.location}: may change {counted(changed)}")
            if expert.head:
                lines.append(f"    own head, kept apart: {', '.join(sorted(expert.head.tensors))}")
            if expert.ignored:
                lines.append(f"    left out, not of its model class: {listed(expert.ignored)}")
        merged, copied, costs = self.merged, self.copied, self.costs
        lines += [
            f"  merged: {counted(len(merged))}, {self._ways}",
            f"  unchanged (copied from the base): {counted(len(copied))}" + (f", {listed(copied)}" if copied else ""),
            *([f"  heads merged by their mean: {', '.join(sorted(self.head.tensors))}"] if self.head else []),
            *([f"  tokenizer of {self.tokenizer.location}"] if self.tokenizer.is_expert else []),
            *([f"  {self.vocabulary}"] if self.vocabulary else []),
            f"  to download: {readable_size(costs.bytes_to_download)}",
            f"  to read: {readable_size(costs.bytes_read)}",
            f"  to write: {readable_size(costs.bytes_written)}",
            *([f"  {self.rounding}"] if self.rounding else []),
            f"  disk needed: {readable_size(costs.disk)}",
            f"  memory needed: about {readable_size(costs.memory)}",
            f"  time, after the download: very roughly {costs.seconds:.0f} s with threads={self.threads} "
            f"and {self.kernel}",
        ]
        lines += [f"  Note: {note}" for note in self.notes]
        if self.downloaded:
            lines.append(
                f"  downloaded for this plan, because .bin files have no header to check: {listed(self.downloaded)}"
            )
        return "\n".join(map(printable, lines))

    @property
    def _ways(self) -> str:
        """How many parameters are merged in each way."""
        whole = sum(unit.by_matrix for unit in self.units)
        neuronal = sum(unit.is_neuronal for unit in self.units) - whole
        ways = [f"{whole} as whole matrices"] if whole else []
        ways += [f"{neuronal} by neurons", f"{len(self.merged) - whole - neuronal} by single entries"]
        return ", ".join(ways)
