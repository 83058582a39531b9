"""Models in memory, which stand where the folder or the id of a model may."""

from typing import Any

CLASSES = {("transformers.modeling_utils", "PreTrainedModel"), ("peft.peft_model", "PeftModel")}
"""The base classes of the models that are taken, by module and name, so that none of these has to be imported."""


class LiveModel(str):
    """A model in memory. As a text it says so, for error messages.

    Attributes:
        model: the `PreTrainedModel` or `PeftModel`.
    """

    model: Any

    def __new__(cls, model: Any) -> "LiveModel":
        """Return the reference to a model."""
        live = super().__new__(cls, f"the {type(model).__name__} in memory")
        live.model = model
        return live


def is_model(value: object) -> bool:
    """Whether a value is a model of transformers or PEFT."""
    return any((kind.__module__, kind.__name__) in CLASSES for kind in type(value).__mro__)
