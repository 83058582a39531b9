"""The base of a merge is the model that the training began with, wherever it comes from."""

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    TrainerCallback,
)

from neuromerge_hf import (
    AutoMergedModel,
    NeuroMergeCallback,
)
from neuromerge_hf.folder.recipe import load_recipe
from neuromerge_hf.folder.report import load_report
from tiny_models import load, save_bert, save_fine_tune
from tiny_training import MERGED, TRAINED, classifier, logged, measure, train
from trainer_callbacks import refused


def test_a_base_on_the_hub_is_that_of_the_beginning(models, hub, tmp_path):
    base, other = models
    commit = hub.add_folder("trained-from/base", base)

    class Newer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hub.add_folder("trained-from/base", other)

    train(classifier("trained-from/base"), tmp_path / "run", NeuroMergeCallback([other]), Newer())
    recipe = load_recipe(tmp_path / "run" / MERGED / "recipe.yaml")
    assert recipe.base_model.reference == f"trained-from/base@{commit}"


def test_an_adapter_that_is_trained_further_is_merged_into_its_base(models, tmp_path):
    base, other = models
    train(classifier(base, adapter=True), tmp_path / "first", NeuroMergeCallback([other], evaluate=False))
    model = PeftModel.from_pretrained(classifier(base), tmp_path / "first" / TRAINED, is_trainable=True)
    train(model, tmp_path / "second", NeuroMergeCallback([tmp_path / "first" / TRAINED]))
    report = load_report(tmp_path / "second" / MERGED)
    assert [expert.kind for expert in report.experts] == ["LoRA r=8", "LoRA r=8"]
    assert report.base_model == base.name


def test_transformers_own_adapters_are_trained_and_merged(models, tmp_path):
    base, other = models
    train(classifier(base, adapter=True), tmp_path / "first", NeuroMergeCallback([other], evaluate=False))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.load_adapter(tmp_path / "first" / TRAINED, is_trainable=True)
    trainer = train(model, tmp_path / "second", NeuroMergeCallback([other]))
    assert load_report(tmp_path / "second" / MERGED).experts[0].kind == "LoRA r=8"
    expected = measure(AutoMergedModel.from_pretrained(tmp_path / "second" / MERGED, head="trained"))
    (merged,) = logged(trainer, "merged_eval_loss")
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_a_named_adapter_is_found_in_its_folder(models, tmp_path):
    base, other = models
    model = classifier(base)
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), adapter_name="mine")
    train(model, tmp_path, NeuroMergeCallback([other]))
    assert [expert.name for expert in load_report(tmp_path / MERGED).experts] == ["mine", "other"]


def test_a_model_with_random_weights_is_refused_with_what_to_pass(models, tmp_path):
    base, other = models
    config = AutoConfig.from_pretrained(base, num_labels=2)
    noted = BertForSequenceClassification(config)  # transformers notes the base's name, but the weights are others
    assert noted.name_or_path == str(base)
    message = refused(noted, tmp_path / "run", NeuroMergeCallback([other]), "not those of")
    assert "base_model=DIR" in message
    config._name_or_path = ""
    message = refused(BertForSequenceClassification(config), tmp_path / "run", NeuroMergeCallback([other]), "not known")
    assert "base_model=DIR" in message


def test_a_model_with_random_weights_that_were_saved_is_its_own_base(tmp_path):
    config = AutoConfig.from_pretrained(save_bert(tmp_path / "like"), num_labels=2)
    config._name_or_path = ""
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "start")
    other = save_fine_tune(tmp_path / "start", tmp_path / "other", seed=2)
    train(model, tmp_path / "run", NeuroMergeCallback([other], base_model=tmp_path / "start"))
    assert load_report(tmp_path / "run" / MERGED).base_model == "start"


def test_a_checkpoint_of_the_same_run_is_no_base(models, tmp_path):
    base, other = models
    train(classifier(base), tmp_path, NeuroMergeCallback([other]), save_strategy="steps", save_steps=2)
    refused(classifier(tmp_path / "checkpoint-2"), tmp_path, NeuroMergeCallback([other]), "which this training saved")


def named(model, base):
    """Write a card that names the base of a model, as the Trainer does."""
    (model / "README.md").write_text(f"---\nbase_model: {base}\n---\n\n# {model.name}\n")
    return model


def fine_tuned_further(base, folder):
    """The model of a first training, from which a second one starts, and an expert of the base beside it."""
    first = save_fine_tune(base, folder / "first", seed=3)
    classifier(first).save_pretrained(first)
    return named(first, "us/start"), named(save_fine_tune(base, folder / "expert", seed=2), "us/start")


def test_the_base_that_all_were_fine_tuned_from_is_taken_if_their_cards_name_it(models, hub, tmp_path, caplog):
    base, _ = models
    commit = hub.add_folder("us/start", base)
    first, expert = fine_tuned_further(base, tmp_path)
    train(classifier(first), tmp_path / "run", NeuroMergeCallback([expert], evaluate=False))
    recipe = load_recipe(tmp_path / "run" / MERGED / "recipe.yaml")
    assert recipe.base_model.reference == f"us/start@{commit}"
    assert f"The base of the merge is us/start@{commit}" in caplog.text


def test_the_base_that_the_user_names_is_taken_whatever_the_cards_say(models, tmp_path):
    base, _ = models
    first, expert = fine_tuned_further(base, tmp_path)
    train(classifier(first), tmp_path / "run", NeuroMergeCallback([expert], base_model=first, evaluate=False))
    assert load_report(tmp_path / "run" / MERGED).base_model == "first"


def test_experts_of_another_base_than_training_started_from_are_refused(models, tmp_path):
    base, _ = models
    first, expert = fine_tuned_further(base, tmp_path)
    callback = NeuroMergeCallback([expert])
    message = refused(classifier(first, adapter=True), tmp_path / "run", callback, "was trained from us/start")
    assert "Merge the adapter into" in message
    named(first, "us/another")
    message = refused(classifier(first), tmp_path / "run", callback, "was trained from us/start")
    assert f"pass base_model='{first}'" in message
    adapter = get_peft_model(load(base), LoraConfig(target_modules=["query"]))
    adapter.peft_config["default"].base_model_name_or_path = "us/start"
    adapter.save_pretrained(tmp_path / "adapter")
    refused(classifier(first), tmp_path / "run", NeuroMergeCallback([tmp_path / "adapter"]), "adapter says that it was")


def test_experts_are_taken_at_the_commit_that_they_had_when_training_started(models, hub, tmp_path):
    base, other = models
    commit = hub.add_folder("us/expert", other)

    class Newer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hub.add_folder("us/expert", base)

    train(classifier(base), tmp_path / "run", NeuroMergeCallback(["us/expert"], evaluate=False), Newer())
    recipe = load_recipe(tmp_path / "run" / MERGED / "recipe.yaml")
    assert recipe.models[1].reference == f"us/expert@{commit}"


def test_an_expert_whose_weights_are_of_another_base_is_warned_of_before_training(models, tmp_path, caplog):
    base, _ = models
    stranger = save_bert(tmp_path / "stranger", seed=9)

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.seen = caplog.text

    look = Look()
    train(classifier(base), tmp_path / "run", NeuroMergeCallback([stranger], evaluate=False), look)
    assert "stranger is probably no fine-tune of base" in look.seen
    assert "trained is probably" not in caplog.text
