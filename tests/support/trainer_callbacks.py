"""Callbacks that observe or disturb training, and a check that training is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from neuromerge_hf import MergeError
from tiny_training import train


class Recorder(TrainerCallback):
    """Records the number of steps and the logs."""

    def __init__(self) -> None:
        self.steps = 0
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Dropouts(TrainerCallback):
    """Switches dropout on, so that the result of training depends on the random state."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1


def refused(model: Any, folder: Path, callback: TrainerCallback, match: str, **changes: Any) -> str:
    """Assert that training is refused before its first step, and return the message."""
    recorder = Recorder()
    with pytest.raises(MergeError, match=match) as raised:
        train(model, folder, recorder, callback, **changes)
    assert recorder.steps == 0
    return str(raised.value)


class Remover(TrainerCallback):
    """Renames an expert's folder during training, so that the expert is missing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.folder.rename(self.folder.with_name("hidden"))
