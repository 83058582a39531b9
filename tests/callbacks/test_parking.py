"""While merged weights are evaluated, the trained ones wait on the disk, and come back bit by bit."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluation_memory
from neuromerge_hf import MergeError, NeuroMergeCallback
from neuromerge_hf.callbacks.common.parking import WeightsLostError
from neuromerge_hf.callbacks.common.weights import replaced
from tiny_training import classifier, make_trainer
from trainer_callbacks import Recorder

VALUES = [
    torch.tensor([[1.0, float("nan")], [-0.0, float("inf")]]),
    torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),  # not contiguous
    torch.tensor(7),
    torch.empty(0, 4),
    torch.tensor([True, False]),
    torch.arange(4.0).to(torch.float8_e4m3fn),
]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_values_come_back_bit_by_bit_even_after_an_error(tmp_path, fails):
    live = {str(number): value.clone() for number, value in enumerate(VALUES)}
    others = {name: torch.zeros_like(value) for name, value in live.items()}
    error = RuntimeError if fails else ()
    with pytest.raises(error) if fails else torch.no_grad(), replaced(live, others, tmp_path):
        assert not any(any(bits(tensor)) for tensor in live.values())
        assert not list(tmp_path.iterdir()), "the file has no name"
        if fails:
            raise RuntimeError
    for value, tensor in zip(VALUES, live.values(), strict=True):
        assert bits(tensor) == bits(value)
        assert tensor.stride() == value.clone().stride()


def test_tied_tensors_come_back(tmp_path):
    one = torch.ones(3)
    with replaced({"a": one, "b": one}, {"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path):
        assert one.tolist() == [0, 0, 0]
    assert one.tolist() == [1, 1, 1]


def test_an_error_among_the_new_values_leaves_the_old_ones(tmp_path):
    live = {"a": torch.ones(3), "b": torch.ones(3)}
    with pytest.raises(RuntimeError), replaced(live, {"a": torch.zeros(3), "b": torch.zeros(4)}, tmp_path):
        pass
    assert live["a"].tolist() == [1, 1, 1]


def test_a_disk_without_room_is_said_before_anything_changes(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    live = {"a": torch.ones(3)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    refused = pytest.raises(MergeError, match=rf"\(12 B\) cannot be put aside in {tmp_path}: File too large")
    try:
        with refused, replaced(live, {"a": torch.zeros(3)}, tmp_path):
            pytest.fail("the block ran")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert live["a"].tolist() == [1, 1, 1]


def damage_parked_weights(folder):
    """Shorten the file without a name in a folder, in which the weights wait."""
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_symlink() and os.readlink(descriptor).startswith(str(folder)):
            os.truncate(descriptor, 0)


def test_a_training_whose_weights_are_lost_does_not_go_on(models, tmp_path):
    base, other = models
    recorder = Recorder()
    callback = NeuroMergeCallback([other], when="epoch")
    trainer = make_trainer(classifier(base), tmp_path, callback, recorder, max_steps=-1, num_train_epochs=2)

    def damage(prediction):
        damage_parked_weights(tmp_path)
        return {}

    trainer.compute_metrics = damage
    with pytest.raises(WeightsLostError, match=r"cannot be read back from the disk.*resume it from a checkpoint"):
        trainer.train()
    assert recorder.steps == 4, "the second epoch did not begin"


def test_the_memory_of_an_evaluation_is_that_of_one_shard(tmp_path):
    # With a fixed threshold, the C library gives back every tensor at once, so that what is free is not counted.
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **settings}
    command = [sys.executable, evaluation_memory.__file__, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    used, shard = map(int, output.split()[-2:])
    assert used <= 1.2 * shard, output
