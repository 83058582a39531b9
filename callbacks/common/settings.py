"""The settings of a callback in any framework."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from neuromerge_hf.callbacks.common.average import Window, check_window
from neuromerge_hf.errors import MergeError
from neuromerge_hf.options import option
from neuromerge_hf.spec import OPTION_NAMES, MergeOptions
from neuromerge_hf.tuning.search import TuningGrid
from neuromerge_hf.typed import check_value

When = Literal["train_end", "save", "epoch"]

TRAINED, AVERAGED = "trained", "averaged"
"""The names of the folders of the models that a training gives, and so their names in the report and the card."""

PREFIX = re.compile(r"[A-Za-z]\w*")


@dataclass(frozen=True, kw_only=True)
class CallbackSettings:
    """When a callback merges, where it writes, and what it does with the merged model.

    Raises:
        MergeError: if a value is not valid.
    """

    when: When = option(
        "train_end",
        "when to merge: at the end of the training (train_end), for each checkpoint (save) or for the model after each "
        "epoch (epoch). The last two write to folders ``step-N``. Their failures do not stop training, but are raised "
        "when it ends. The merge of a checkpoint is deleted when training deletes the checkpoint (save_total_limit)",
    )
    output_dir: str | Path | None = option(
        None,
        "the folder of the merged model. An earlier merge there is replaced. `Trainer.push_to_hub` uploads what is in "
        "``args.output_dir``, but for names that start with an underscore",
        shown="<args.output_dir>/_neuromerge/merged",
    )
    evaluate: bool = option(
        True,
        "evaluate the merged model, with the trained model's own head, on the trainer's `eval_dataset`. Its metrics "
        "``merged_eval_*`` appear beside ``eval_*`` in the log history, in every logger and in the card. The trained "
        "model is evaluated as well if it was not when training ended. Meanwhile its weights wait in a file, on the "
        "disk of the merged model",
    )
    metric_prefix: str = option(
        "merged",
        "the first word of the merged model's metrics, and the name of its folder unless `output_dir` names another. "
        "Two callbacks of one training need two",
    )
    in_checkpoints: bool = option(
        False, 'with when="save": write each merge into the folder of its checkpoint (``checkpoint-N/merged``)'
    )
    push_to_hub: bool = option(False, "push the merged model with its card")
    hub_model_id: str | None = option(
        None,
        "the repository to push to",
        shown="<args.hub_model_id>-merged, or a name made from `args.output_dir`",
    )
    private: bool | None = option(
        None,
        "whether a repository that the push creates is private",
        shown="<args.hub_private_repo>, or the default of the organisation",
    )
    checkpoints: Literal["all"] | int | None = option(
        None, 'also merge checkpoints of the training itself: "all", or the number of the last ones'
    )
    average_checkpoints: int | Sequence[float] | None = option(
        None,
        "merge the average of the last models of this training instead of the trained model: how many (the trained "
        "model and the checkpoints before it), or their weights, oldest first. The average is saved in ``averaged``, "
        "beside ``trained``, as a full model in float32, and evaluated (``averaged_eval_*``). Without other experts it "
        "is itself the result",
    )
    tune: bool | TuningGrid = option(
        False,
        "tune the lambdas by a metric of the merged model on the trainer's `eval_dataset`: "
        "``args.metric_for_best_model`` (in Lightning, what a `ModelCheckpoint` monitors), or else the loss. True, or "
        "a `TuningGrid` of values to try. One evaluation before training checks that the metric exists",
    )

    def __post_init__(self) -> None:
        for name in (
            "output_dir",
            "evaluate",
            "metric_prefix",
            "in_checkpoints",
            "push_to_hub",
            "hub_model_id",
            "private",
        ):
            check_value(name, getattr(self, name), get_type_hints(CallbackSettings)[name])
        if not PREFIX.fullmatch(self.metric_prefix) or self.metric_prefix in (TRAINED, AVERAGED):
            raise MergeError(
                "metric_prefix must be a word of letters, digits and underscores, other than trained and averaged, not "
                f"{self.metric_prefix!r}."
            )
        if self.in_checkpoints and (self.when != "save" or self.output_dir is not None):
            raise MergeError('in_checkpoints=True needs when="save", and no output_dir.')
        if not isinstance(self.tune, bool | TuningGrid):
            raise MergeError(f"tune must be True, False or a TuningGrid, not {self.tune!r}.")
        if self.when not in ("train_end", "save", "epoch"):
            raise MergeError(f'when must be "train_end", "save" or "epoch", not {self.when!r}.')
        is_count = isinstance(self.checkpoints, int) and not isinstance(self.checkpoints, bool) and self.checkpoints > 0
        if self.checkpoints not in (None, "all") and not is_count:
            raise MergeError(f'checkpoints must be "all" or how many of the last ones, not {self.checkpoints!r}.')
        if self.average_checkpoints is not None:
            object.__setattr__(self, "average_checkpoints", check_window(self.average_checkpoints))
            if self.checkpoints is not None:
                raise MergeError(
                    "checkpoints= makes the checkpoints of the training experts of their own, and average_checkpoints= "
                    "averages them into one expert. Choose one of the two."
                )

    @property
    def window(self) -> Window | None:
        """The last models that are averaged; None if the trained model is merged as it is."""
        window: Any = self.average_checkpoints
        return window


class CallbackOptions(MergeOptions, total=False):
    """The keyword arguments of a callback."""

    when: When
    output_dir: str | Path | None
    evaluate: bool
    metric_prefix: str
    in_checkpoints: bool
    push_to_hub: bool
    hub_model_id: str | None
    private: bool | None
    checkpoints: Literal["all"] | int | None
    average_checkpoints: int | Sequence[float] | None
    tune: bool | TuningGrid


NOT_TAKEN = ("overwrite",)
"""Options of `merge` that a callback does not take. It overwrites earlier merges, and nothing else."""

CALLBACK_NAMES = (
    *(field.name for field in fields(CallbackSettings)),
    *(name for name in OPTION_NAMES if name not in NOT_TAKEN),
)
