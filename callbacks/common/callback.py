"""The arguments that the callbacks of all frameworks share."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from neuromerge_hf.callbacks.common.merging import Merging
from neuromerge_hf.callbacks.common.run import MergeRun
from neuromerge_hf.callbacks.common.settings import (
    CALLBACK_NAMES,
    NOT_TAKEN,
    CallbackOptions,
    CallbackSettings,
)
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.methods.neuromerging import NeuroMergingConfig
from neuromerge_hf.options import check_names, pick, with_options
from neuromerge_hf.spec import MergeSpec, Models, Runtime

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MergingCallback:
    """Merges the trained model with other experts of its base when training ends.

    Experts are validated before training starts, so that a wrong expert stops a run at once. When training ends, the
    trained model is saved in ``<args.output_dir>/_neuromerge/trained``, then merged, evaluated and, if asked, pushed.
    The trainer and its model are left unchanged.

    Attributes:
        report: the report on the last merge; None before it.
        metrics: the metrics of its evaluation, by the names under which they are logged.
        merged_dir: the folder of the merged model.

    Examples:
        >>> callback = NeuroMergeCallback(["math"], base_model="base")
        >>> trainer = Trainer(model, args, train_dataset=texts, callbacks=[callback])
        >>> output = trainer.train()
        {'train_runtime': ...
        >>> callback.merged_dir.name
        'merged'

        Or, like the callbacks of TRL:

        >>> trainer = Trainer(model, args, train_dataset=texts)
        >>> trainer.add_callback(NeuroMergeCallback(["math"], base_model="base", trainer=trainer))
    """

    @with_options(CallbackSettings, MergeSpec, Runtime, without=NOT_TAKEN)
    def __init__(self, models: Models = (), **options: "Unpack[CallbackOptions]"):
        """Check the arguments.

        Args:
            models: the other experts, as in `neuromerge_hf.merge`. It may be empty with `checkpoints` or
                `average_checkpoints`.
            base_model: the model that all were fine-tuned from. Default: what the trained model was loaded from,
                or the base of that if its card and those of the experts name it. transformers notes no revision: pass
                ``id@revision`` if it was loaded at one.
            **options: the fields of `CallbackSettings`, `MergeSpec` and `Runtime`.

        Raises:
            MergeError: if an argument is wrong. Training itself raises it at its start if the models cannot be merged,
                and at its end if the merge fails, with the trained model's folder and the command to try again.
        """
        check_names(type(self).__name__, options, CALLBACK_NAMES)
        settings = pick(CallbackSettings, options)
        if settings.tune and options.get("config") is None:
            options["config"] = NeuroMergingConfig()  # the method that has lambdas
        self._run = MergeRun(Merging(pick(MergeSpec, options, models=models), pick(Runtime, options), settings))

    @property
    def report(self) -> MergeReport | None:
        return self._run.outcome.report if self._run.outcome else None

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self._run.outcome.metrics) if self._run.outcome else {}

    @property
    def merged_dir(self) -> Path | None:
        return self._run.outcome.places.merged if self._run.outcome else None

    def _plan(self, training: Training, callbacks: Iterable[object]) -> None:
        """Check everything before training starts, also against the other callbacks of the training."""
        others = [each._run for each in callbacks if isinstance(each, MergingCallback) and each is not self]
        self._run.plan(training, others)
