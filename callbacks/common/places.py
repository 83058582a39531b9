"""The folders in which a callback saves models."""

import re
from dataclasses import dataclass
from pathlib import Path

from neuromerge_hf.callbacks.common.settings import AVERAGED, TRAINED, CallbackSettings
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.paths import user_path

ROOT = "_neuromerge"
"""The folder in that of the training. `Trainer.push_to_hub` uploads nothing whose path starts with an underscore."""

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""The names of the folders in which transformers saves checkpoints."""


@dataclass(frozen=True)
class Places:
    """The folders for the models of one merge.

    Attributes:
        trained: that of the trained model, unless a checkpoint is merged.
        averaged: that of the average of the training's last models.
        merged: that of the merged model.
    """

    trained: Path
    averaged: Path
    merged: Path


def root_of(training: Training) -> Path:
    """The folder that holds all places but those that the user chose. One folder is for all trials of a search."""
    return training.folder.parent / ROOT / training.trial if training.trial else training.folder / ROOT


def places_of(training: Training, settings: CallbackSettings, number: int) -> Places:
    """The places of the merge of the model after `number` steps."""
    step = "" if settings.when == "train_end" else f"step-{number}"
    saved = root_of(training) / step
    merged = saved / settings.metric_prefix
    if settings.output_dir is not None:
        merged = user_path(settings.output_dir, "output_dir").absolute() / (training.trial or "") / step
    elif settings.in_checkpoints:
        merged = training.folder / f"checkpoint-{number}" / settings.metric_prefix
    return Places(saved / TRAINED, saved / AVERAGED, merged)


def check_places(training: Training, settings: CallbackSettings) -> None:
    """Raise a `MergeError` if the merged model cannot be where the user wants it. The folders need not exist yet."""
    places = places_of(training, settings, training.step)
    merged, folder = places.merged.resolve(), training.folder.resolve()
    replaced = [path.resolve() for path in (places.trained, places.averaged)]
    advice = f"Choose another output_dir, or leave it out for {root_of(training) / settings.metric_prefix}."
    if training.pushes(merged):
        raise MergeError(
            f"The merged model in {merged} would be uploaded with the pushes of the training itself "
            f"(args.push_to_hub=True). {advice}"
        )
    if settings.output_dir is None:
        return
    for written in (*(path.resolve() for path in training.written), *replaced):
        if written.is_relative_to(merged):
            raise MergeError(f"The merged model cannot replace {merged}: training writes to {written}. {advice}")
    if any(merged.is_relative_to(path) for path in replaced):
        raise MergeError(f"The merged model cannot be in {merged}: the trained model is saved there. {advice}")
    if merged.is_relative_to(folder) and CHECKPOINT.fullmatch(merged.relative_to(folder).parts[0]):
        raise MergeError(
            f"The merged model cannot be in {merged}, a checkpoint of the training. in_checkpoints=True, with "
            f'when="save", writes the merge of each checkpoint into it. {advice}'
        )
