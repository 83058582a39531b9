"""What a merge will do: the units that it writes, from which tensors, and what that costs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.folder.report import VocabularyReport
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.text import counted, different_names, listed, readable_size

if TYPE_CHECKING:  # they load transformers
    from neuromerge_hf.sources.base import Base
    from neuromerge_hf.sources.expert import Expert
    from neuromerge_hf.sources.merged_head import MergedHead
    from neuromerge_hf.vocabulary.tokenizer import TokenizerChoice


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        config: the method and its hyper-parameters.
        base: the base model, opened.
        experts: the experts, opened, in the user's order.
        units: every tensor that will be written, in the order of their names, which is the order of all sums.
        dtype: the name of the dtype that was asked for, or "auto" for each tensor's own.
        tokenizer: where the tokenizer comes from. The rows of `base` and of the experts are already in its order.
        head: the head that is made of the experts' own; None if they are kept apart.
        bytes_to_download: the size of the weight files that are not in the Hub's cache yet.
        downloaded: the models whose weights had to be downloaded to be planned, because ``.bin`` files have no header.
        threads: how many compute.
    """

    config: MergeConfig
    base: "Base"
    experts: "tuple[Expert, ...]"
    units: tuple[Unit, ...]
    dtype: str
    tokenizer: "TokenizerChoice"
    head: "MergedHead | None" = None
    bytes_to_download: int = 0
    downloaded: tuple[str, ...] = ()
    threads: int = 1

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
    def model_names(self) -> list[str]:
        """Different names for the base and then the experts."""
        return different_names(self.base.location.name, [expert.name for expert in self.experts])

    @property
    def architecture(self) -> str | None:
        """The merged model's class, if not the base's: the experts', where they agree and none has its own head."""
        if self.head:
            return self.head.model_class_name
        classes = {expert.model_class_name for expert in self.experts}
        if len(classes) == 1 and not any(expert.head for expert in self.experts):
            return classes.pop()
        return None

    @property
    def vocabulary(self) -> VocabularyReport | None:
        """How tokens are aligned; None where all models have the same."""
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
    def bytes_written(self) -> int:
        """The size of the merged weights, and of the heads beside them."""
        heads = sum(expert.head.nbytes for expert in self.experts if expert.head)
        return sum(unit.nbytes for unit in self.units) + heads

    @property
    def bytes_read(self) -> int:
        """How much is read in all: for the thresholds, if values are trimmed, and once for the merge.

        Not counted: the samples that predict the thresholds, and hashing local files for the recipe.
        """
        passes = self.config.passes
        return sum(unit.bytes_read * (passes if unit.task_vectors else 1) for unit in self.units)

    @property
    def disk_needed(self) -> int:
        """What is downloaded, written, and kept in temporary files beside the output, in bytes."""
        temporary = sum(expert.preparation.nbytes for expert in self.experts if expert.preparation)
        return self.bytes_to_download + self.bytes_written + temporary

    @property
    def memory_needed(self) -> int:
        """An estimate of the private memory, in bytes; see `costs.memory_needed`."""
        from neuromerge_hf.planning.costs import memory_needed  # looks at the engine, which needs this module

        return memory_needed(self)

    @property
    def seconds_needed(self) -> float:
        """A rough estimate of the time on a CPU, without the download; see `costs.seconds_needed`."""
        from neuromerge_hf.planning.costs import seconds_needed

        return seconds_needed(self)

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
        neuronal = sum(unit.is_neuronal for unit in self.units)
        merged, copied = self.merged, self.copied
        lines += [
            f"  merged: {counted(len(merged))}, {neuronal} by neurons, {len(merged) - neuronal} by single entries",
            f"  copied from the base: {counted(len(copied))}" + (f" ({listed(copied)})" if copied else ""),
            *([f"  heads merged by their mean: {', '.join(sorted(self.head.tensors))}"] if self.head else []),
            *([f"  tokenizer of {self.tokenizer.location}"] if self.tokenizer.is_expert else []),
            *([f"  {self.vocabulary}"] if self.vocabulary else []),
            f"  to download: {readable_size(self.bytes_to_download)}",
            f"  to read: {readable_size(self.bytes_read)}",
            f"  to write: {readable_size(self.bytes_written)}",
            f"  disk needed: {readable_size(self.disk_needed)}",
            f"  memory needed: about {readable_size(self.memory_needed)}",
            f"  time, after the download: very roughly {self.seconds_needed:.0f} s with threads={self.threads}",
        ]
        lines += [f"  Note: {note}" for expert in self.experts for note in expert.notes]
        if self.downloaded:
            lines.append(
                f"  downloaded for this plan, because .bin files have no header to check: {listed(self.downloaded)}"
            )
        return "\n".join(lines)
