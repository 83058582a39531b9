"""The record of an opened expert, for all kinds of experts."""

from dataclasses import dataclass, field

from neuromerge_hf.skeleton import ParameterRef
from neuromerge_hf.sources.computed import ComputedTensors
from neuromerge_hf.sources.heads import Head
from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.storage.location import Location


@dataclass(frozen=True)
class Expert:
    """An opened expert. No weights are read yet.

    Attributes:
        name: the name of the expert in the merge, which also selects its head.
        kind: "full", or the type of the adapter.
        model_class_name: the class that the expert was trained as; None if it names none.
        task_vectors: the task vectors by the parameters that they change.
        head: the parameters that the expert has and the base lacks.
        ignored: the names of tensors in its files that its own model class does not have.
        computed: the tensors that must be computed before the task vectors can be read.
        notes: remarks on the expert for the report.
    """

    name: str
    location: Location
    kind: str
    model_class_name: str | None
    task_vectors: dict[ParameterRef, TaskVector]
    head: Head | None = None
    ignored: list[str] = field(default_factory=list)
    computed: ComputedTensors | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        """Whether the expert is an adapter rather than a full checkpoint."""
        return self.kind != "full"
