"""A training loop of one's own with accelerate ends in a merge, as a Trainer does with the callback."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from neuromerge_hf import MergeError, merge
from neuromerge_hf.callbacks.accelerate import merge_at_end
from neuromerge_hf.folder.report import load_report
from tiny_models import contents
from tiny_training import MERGED, TRAINED, Texts, classifier, measure


def train(accelerator, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in DataLoader(Texts(), batch_size=4):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("adapter", [False, True])
def test_what_was_trained_is_merged_measured_and_logged(models, tmp_path, adapter):
    base, other = models
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    model = accelerator.prepare(classifier(base, adapter=adapter).train())
    with merge_at_end(accelerator, model, [other], evaluate=measure) as merging:
        assert merging.report is None
        train(accelerator, model)
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.training
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    merge([tmp_path / TRAINED, other], tmp_path / "expected", base_model=base)
    found, expected = contents(tmp_path / MERGED), contents(tmp_path / "expected")
    assert found["model.safetensors"] == expected["model.safetensors"]
    results = {(result.model, result.metric): result.value for result in load_report(tmp_path / MERGED).results}
    assert results["merged", "loss"] == merging.metrics["merged_loss"] != merging.metrics["loss"]
    assert results["trained", "accuracy"] == measure(model)["accuracy"]


def test_trackers_get_the_metrics(models, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base, other = models
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="tensorboard")
    accelerator.init_trackers("loop")
    with merge_at_end(accelerator, classifier(base), [other], evaluate=measure) as merging:
        pass
    accelerator.end_training()
    shown = EventAccumulator(str(tmp_path / "loop")).Reload()
    assert shown.Scalars("merged_loss")[0].value == pytest.approx(merging.metrics["merged_loss"])


def test_what_is_wrong_is_said_before_the_loop(models, tmp_path):
    base, other = models
    accelerator, model = Accelerator(cpu=True, project_dir=tmp_path), classifier(base)
    for experts, options, match in (
        ([tmp_path / "absent"], {}, "absent"),
        ([other], {"output_dir": tmp_path}, "training writes to"),
        ([other], {"tune": True}, "nothing to evaluate"),
    ):
        with pytest.raises(MergeError, match=match), merge_at_end(accelerator, model, experts, **options):
            pytest.fail("the loop ran")
    with (
        pytest.raises(TypeError, match="no argument 'checkpoints'"),
        merge_at_end(accelerator, model, [other], checkpoints="all"),
    ):
        pytest.fail("the loop ran")
    with (
        pytest.raises(MergeError, match="is not of transformers or PEFT"),
        merge_at_end(accelerator, torch.nn.Linear(2, 2), [other]),
    ):
        pytest.fail("the loop ran")


def test_after_an_error_in_the_loop_nothing_is_merged(models, tmp_path):
    base, other = models
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    with pytest.raises(ZeroDivisionError), merge_at_end(accelerator, classifier(base), [other]):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
