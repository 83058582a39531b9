"""Every public name has a docstring with an example, and the examples run as they stand."""

import doctest
import functools
import inspect

import lightning.pytorch as pl
import pytest
import torch
import transformers
from accelerate import Accelerator

import neuromerge_hf
from neuromerge_hf.callbacks.accelerate import merge_at_end
from neuromerge_hf.callbacks.lightning import NeuroMergeCallback as LightningCallback
from tiny_models import load, save_adapter, save_fine_tune, save_llama

OBJECTS = {name: getattr(neuromerge_hf, name) for name in neuromerge_hf.__all__}
OBJECTS["AutoMergedModel"] = neuromerge_hf.AutoMergedModel.from_pretrained
OBJECTS["LightningCallback"] = LightningCallback
OBJECTS["merge_at_end"] = merge_at_end


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a base, a fine-tune of it and an adapter, by the names that the examples use."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "base")
    save_fine_tune(folder / "base", folder / "math", seed=1)
    save_adapter(folder / "base", folder / "code-lora", seed=2)
    return folder


def training(folder):
    """What a training with transformers starts from."""
    texts = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    args = transformers.TrainingArguments(
        folder / "run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    return {"model": load(folder / "base"), "args": args, "texts": texts, "Trainer": transformers.Trainer}


class Module(pl.LightningModule):
    """A LightningModule around a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model.train()

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def lightning_training(folder):
    """What a training with Lightning starts from."""
    tokens = torch.tensor([5, 6, 7])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {
        "NeuroMergeCallback": LightningCallback,
        "Trainer": functools.partial(pl.Trainer, accelerator="cpu", enable_checkpointing=False, **quiet),
        "module": Module(load(folder / "base")),
        "texts": torch.utils.data.DataLoader([{"input_ids": tokens, "labels": tokens}]),
    }


def loop(folder):
    """What a loop with accelerate starts from."""
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    return {"Accelerator": Accelerator, "merge_at_end": merge_at_end, "model": load(folder / "base"), "batch": batch}


TRAININGS = {"NeuroMergeCallback": training, "LightningCallback": lightning_training, "merge_at_end": loop}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_example_runs(name, models, monkeypatch, tmp_path):
    for folder in models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    given = {each: getattr(neuromerge_hf, each) for each in neuromerge_hf.__all__}
    given |= TRAININGS[name](models) if name in TRAININGS else {}
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(OBJECTS[name]), given, name, None, 0)
    assert examples.examples, f"{name} has no example"
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.DocTestRunner(optionflags=flags).run(examples, out=said.append)
    assert outcome.failed == 0, "".join(said)


@pytest.mark.parametrize("name", [name for name, each in OBJECTS.items() if inspect.isroutine(each)])
def test_a_function_says_what_it_takes_returns_and_raises(name):
    sections = set(inspect.getdoc(OBJECTS[name]).splitlines())
    assert {"Args:", "Returns:", "Raises:", "Examples:"} <= {line.strip() for line in sections}
