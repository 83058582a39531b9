"""The arguments that the callbacks of all frameworks share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from neuromerge_hf.callbacks.common.run import MergeRun
from neuromerge_hf.config import MergeConfig, NeuroMergingConfig
from neuromerge_hf.planning.resolve import ModelId
from neuromerge_hf.tuning.search import TuningGrid


class MergingCallback:
    """Merges the model that was trained with other experts of its base, when the training ends.

    Before the training everything is checked that can be, so that a wrong expert stops a run in its first second. At
    its end the trained model is saved in ``<args.output_dir>/trained``, then merged, evaluated, and pushed if asked.
    The trainer and its model stay as they are.

    Args:
        models: the other experts, as in `neuromerge_hf.merge`. May be empty with `checkpoints`.
        base_model: what all were fine-tuned from. Default: what the trained model was loaded from. transformers notes
            no revision: pass ``id@revision`` if it was loaded at one.
        config: the method and its hyper-parameters, as in `neuromerge_hf.merge`.
        when: "train_end"; or "save", for each checkpoint, or "epoch", for the model after each epoch, which go to
            ``step-N`` in `output_dir`. A failure before the end does not stop the training, but is raised after it.
        output_dir: where the merged model goes; ``<args.output_dir>/merged``. An earlier merge there is replaced.
        evaluate: measure the merged model, with the trained model's own head, on the trainer's `eval_dataset`: its
            ``merged_eval_*`` stand beside ``eval_*`` in the log history, in every logger and in the card. The trained
            model is evaluated as well if it was not when training ended.
        push_to_hub: push the merged model with its card.
        hub_model_id: where to; ``<args.hub_model_id>-merged``, or named after `args.output_dir`.
        checkpoints: merge checkpoints of the training itself as well: "all", or how many of the last ones.
        tune: choose the lambdas by the evaluation of the merged model on the trainer's `eval_dataset`: by
            ``args.metric_for_best_model`` (in Lightning, what a `ModelCheckpoint` monitors), else by the loss. Or a
            `TuningGrid` of what to try. On one process alone. One evaluation before the training shows that it gives
            the metric.
        **options: what else `neuromerge_hf.merge` takes: ``dtype``, ``tokenizer``, ``device``, ``token``, ...

    Raises:
        MergeError: before the training if something is wrong with the models or the settings; after it if the merge
            failed. Then it says where the trained model is, and gives the command that tries again.
    """

    def __init__(
        self,
        models: Sequence[ModelId] = (),
        base_model: ModelId | None = None,
        config: MergeConfig | None = None,
        when: Literal["train_end", "save", "epoch"] = "train_end",
        output_dir: str | Path | None = None,
        evaluate: bool = True,
        push_to_hub: bool = False,
        hub_model_id: str | None = None,
        checkpoints: Literal["all"] | int | None = None,
        tune: bool | TuningGrid = False,
        **options: Any,
    ):
        self._run = MergeRun(
            models,
            base_model,
            config or NeuroMergingConfig(),
            when,
            output_dir,
            evaluate,
            push_to_hub,
            hub_model_id,
            checkpoints,
            tune,
            options,
        )
