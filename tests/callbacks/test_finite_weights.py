"""A model in training is not evaluated with merged weights that it cannot hold."""

from pathlib import Path

import pytest
import torch

from changes import says
from neuromerge_hf import MergeError
from neuromerge_hf.callbacks.common.weights import other_weights
from tiny_models import load, save_llama

NORM = "model.norm.weight"


def test_weights_that_the_dtype_of_the_live_model_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = load(save_llama(tmp_path / "base"), dtype=torch.float16)
    before = model.model.norm.weight.detach().clone()
    with pytest.raises(MergeError) as caught, other_weights(model, {NORM: torch.full((32,), 7e4)}, tmp_path):
        pass
    assert says(str(caught.value), NORM, "70000", "float16")
    assert torch.equal(model.model.norm.weight, before)
