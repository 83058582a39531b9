"""What every kind of expert is opened to, and the base that it is compared with."""

from dataclasses import dataclass, field

from neuromerge_hf.skeleton import ParameterRef
from neuromerge_hf.sources.computed import ComputedTensors
from neuromerge_hf.sources.heads import Head
from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.storage.location import Location


@dataclass(frozen=True)
class Expert:
    """An expert, opened: nothing of its weights is read yet.

    Attributes:
        name: the last part of its id, by which its head is asked for.
        kind: "full", or the kind of adapter.
        model_class_name: the architecture that it was trained as, if it says so.
        task_vectors: its changes of the base, by place.
        head: the parameters that it has and the base does not.
        ignored: tensors of its files that its own model class does not know.
        preparation: what has to be computed before its task vectors can be read.
        notes: what the report shall say of it.
    """

    name: str
    location: Location
    kind: str
    model_class_name: str | None
    task_vectors: dict[ParameterRef, TaskVector]
    head: Head | None = None
    ignored: list[str] = field(default_factory=list)
    preparation: ComputedTensors | None = None
    notes: list[str] = field(default_factory=list)
