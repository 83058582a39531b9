"""`merge_at_end`, for a training loop of one's own with accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from neuromerge_hf.callbacks.accelerate_training import AccelerateTraining, Evaluate
from neuromerge_hf.callbacks.common.callback import MergingCallback
from neuromerge_hf.callbacks.common.settings import CALLBACK_NAMES, NOT_TAKEN, CallbackSettings
from neuromerge_hf.options import check_names, with_options
from neuromerge_hf.spec import MergeOptions, MergeSpec, Models, Runtime
from neuromerge_hf.tuning.search import TuningGrid

if TYPE_CHECKING:
    from typing_extensions import Unpack

NOT_IN_A_LOOP = (*NOT_TAKEN, "when", "evaluate", "checkpoints", "average_checkpoints", "in_checkpoints")
"""Options of the callbacks for trainers, which save checkpoints and can evaluate."""


class LoopOptions(MergeOptions, total=False):
    """The keyword arguments of `merge_at_end`."""

    output_dir: str | Path | None
    metric_prefix: str
    push_to_hub: bool
    hub_model_id: str | None
    private: bool | None
    tune: bool | TuningGrid


@contextmanager
@with_options(CallbackSettings, MergeSpec, Runtime, without=NOT_IN_A_LOOP)
def merge_at_end(
    accelerator: Accelerator,
    model: Any,
    models: Models,
    *,
    processing_class: Any = None,
    evaluate: Evaluate | None = None,
    metric: str = "loss",
    greater_is_better: bool = False,
    **options: "Unpack[LoopOptions]",
) -> Iterator[MergingCallback]:
    """Merge the model that is trained in the block with other experts of its base when the block ends.

    Experts are validated before the block runs. After it, the trained model is saved in
    ``<accelerator.project_dir>/_neuromerge/trained``, then merged, evaluated and, if asked, pushed. All processes must
    use it; one merges, and the others wait as long as it takes. After an error in the block, nothing is merged.

    Args:
        accelerator: the Accelerator of the training.
        model: the model in training, prepared or not: of transformers, or with an adapter of PEFT.
        models: the other experts, as in `neuromerge_hf.merge`.
        processing_class: the tokenizer or processor to save with the trained model.
        evaluate: a function that takes `model`, with the merged weights in it, and returns its metrics as a
            dictionary. Every process calls it. Metrics are logged by ``accelerator.log`` as ``merged_...``, and are in
            the card. Default: no evaluation.
        metric: the name of the metric that tells which model is best, for `tune`.
        greater_is_better: whether the largest value of `metric` is the best.
        base_model: the model that all were fine-tuned from. Default: what the trained model was loaded from.
        **options: the fields of `CallbackSettings`, `MergeSpec` and `Runtime`.

    Returns:
        A context manager. It gives an object that has the `report`, the `metrics` and the `merged_dir` of the merge,
        after the block.

    Raises:
        MergeError: before the block if the models cannot be merged, and after it if the merge fails, with the trained
            model's folder and the command to try again.

    Examples:
        >>> accelerator = Accelerator(project_dir="loop")
        >>> with merge_at_end(accelerator, model, ["math"], base_model="base") as merging:
        ...     output = model(**batch).loss.backward()
        >>> merging.merged_dir.name
        'merged'
    """
    check_names("merge_at_end", options, [name for name in CALLBACK_NAMES if name not in NOT_IN_A_LOOP])
    merging = MergingCallback(models, **options, evaluate=evaluate is not None)

    def training() -> AccelerateTraining:
        return AccelerateTraining(accelerator, model, processing_class, evaluate, metric, greater_is_better)

    merging._plan(training(), [])
    yield merging
    merging._run.end(training())
