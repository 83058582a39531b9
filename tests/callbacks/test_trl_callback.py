"""NeuroMergeCallback merges and measures in the trainers of TRL and in the Seq2SeqTrainer as in a plain Trainer."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from neuromerge_hf import AutoMergedModel, NeuroMergeCallback, merge
from neuromerge_hf.folder.report import load_report
from tiny_models import load, save_fine_tune, save_llama, seeded
from tiny_training import MERGED, TRAINED, logged

# TRL calls transformers by old names.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

PREFERENCES = Dataset.from_dict(
    {"prompt": ["the quick"] * 4, "chosen": [" brown fox"] * 4, "rejected": [" lazy dog"] * 4}
)
SENTENCES = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog"] * 8})
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "eval_strategy": "epoch",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base", max_position_embeddings=64)
    return base, save_fine_tune(base, folder / "other", seed=1)


def check_merged(folder, base, other):
    merge([folder / TRAINED, other], folder / "expected", base_model=base)
    found, expected = ((folder / name / "model.safetensors").read_bytes() for name in (MERGED, "expected"))
    assert found == expected


@pytest.mark.parametrize("adapter", [False, True])
def test_sft_trainer(models, tmp_path, adapter):
    base, other = models
    trainer = SFTTrainer(
        load(base),
        SFTConfig(str(tmp_path), bf16=False, max_length=16, **SETTINGS),
        train_dataset=SENTENCES,
        eval_dataset=SENTENCES,
        processing_class=AutoTokenizer.from_pretrained(base, eos_token="[SEP]"),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if adapter else None,
        callbacks=[NeuroMergeCallback([other])],
    )
    trainer.train()
    check_merged(tmp_path, base, other)
    (trained,), (merged,) = logged(trainer, "eval_loss"), logged(trainer, "merged_eval_loss")
    assert {f"merged_{name}" for name in trained if name.startswith("eval_")} <= merged.keys(), "TRL's own, too"
    assert not any(name.startswith("eval_") for name in merged)
    alone = SFTTrainer(
        AutoMergedModel.from_pretrained(tmp_path / MERGED),
        SFTConfig(str(tmp_path / "alone"), bf16=False, max_length=16, **SETTINGS),
        train_dataset=SENTENCES,
        eval_dataset=SENTENCES,
        processing_class=AutoTokenizer.from_pretrained(base, eos_token="[SEP]"),
    )
    assert merged["merged_eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-5)


def dpo_trainer(base, folder, callback, adapter):
    return DPOTrainer(
        load(base),
        args=DPOConfig(str(folder), bf16=False, max_length=16, **SETTINGS),
        train_dataset=PREFERENCES,
        eval_dataset=PREFERENCES,
        processing_class=AutoTokenizer.from_pretrained(base, eos_token="[SEP]"),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if adapter else None,
        callbacks=[callback],
    )


def test_dpo_trainer(models, tmp_path):
    base, other = models
    trainer = dpo_trainer(base, tmp_path, NeuroMergeCallback([other]), adapter=False)
    trainer.train()
    check_merged(tmp_path, base, other)
    (merged,) = logged(trainer, "merged_eval_loss")
    assert merged["merged_eval_rewards/margins"] != 0, "the reference is still the base"


def test_dpo_trainer_of_an_adapter_has_no_reference_to_measure_the_merged_model_with(models, tmp_path, caplog):
    base, other = models
    trainer = dpo_trainer(base, tmp_path, NeuroMergeCallback([other]), adapter=True)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "DPOTrainer compares the model with a reference" in caplog.text
    check_merged(tmp_path, base, other)
    assert not logged(trainer, "merged_")


def reward(completions, completion_ids, **others):
    """The share of even tokens in each completion."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def online_trainer(kind, config, model, base, folder, *callbacks, adapter=False, **settings):
    greedy = {"num_generations": 2, "max_completion_length": 4, "top_k": 1, "per_device_eval_batch_size": 2}
    return kind(
        model,
        args=config(str(folder), bf16=False, **{**SETTINGS, **greedy, **settings}),
        reward_funcs=reward,
        train_dataset=PREFERENCES.select_columns("prompt"),
        eval_dataset=PREFERENCES.select_columns("prompt").select(range(2)),
        processing_class=AutoTokenizer.from_pretrained(base, eos_token="[SEP]", pad_token="[PAD]"),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if adapter else None,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_online_trainers_without_a_reference_are_evaluated(models, tmp_path, kind, config, adapter):
    base, other = models
    callback = NeuroMergeCallback([other])
    trainer = online_trainer(kind, config, load(base), base, tmp_path, callback, adapter=adapter, beta=0.0)
    trainer.train()
    (merged,) = logged(trainer, "merged_eval_reward")
    merged_model = AutoMergedModel.from_pretrained(tmp_path / MERGED)
    alone = online_trainer(kind, config, merged_model, base, tmp_path / "alone", beta=0.0)
    alone.evaluate()
    (expected,) = logged(alone, "eval_reward")
    for name in ("reward", "completions/mean_length", "entropy"):
        assert merged[f"merged_eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-4), name
    (trained,) = logged(trainer, "eval_reward")
    assert merged["merged_eval_entropy"] != pytest.approx(trained["eval_entropy"], abs=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_reward_trainer(models, tmp_path, adapter):
    base, other = models

    def make(model, folder, *callbacks, adapter=False):
        return RewardTrainer(
            model,
            args=RewardConfig(str(folder), bf16=False, max_length=16, **SETTINGS),
            train_dataset=PREFERENCES,
            eval_dataset=PREFERENCES,
            processing_class=AutoTokenizer.from_pretrained(base, eos_token="[SEP]", pad_token="[PAD]"),
            peft_config=LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]) if adapter else None,
            callbacks=list(callbacks),
        )

    with seeded(5):
        model = load(base, "LlamaForSequenceClassification", num_labels=1)
    trainer = make(model, tmp_path, NeuroMergeCallback([other]), adapter=adapter)
    trainer.train()
    (trained,), (merged,) = logged(trainer, "eval_loss"), logged(trainer, "merged_eval_loss")
    alone = make(AutoMergedModel.from_pretrained(tmp_path / MERGED, head="trained"), tmp_path / "alone")
    assert merged["merged_eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-5)
    assert merged["merged_eval_loss"] != pytest.approx(trained["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_online_trainers_whose_reference_is_the_adapters_base_are_not_evaluated(models, tmp_path, caplog, kind, config):
    base, other = models
    trainer = online_trainer(
        kind, config, load(base), base, tmp_path, NeuroMergeCallback([other]), adapter=True, beta=0.1
    )
    trainer.train()
    assert f"{kind.__name__} compares the model with a reference" in caplog.text
    assert not logged(trainer, "merged_")
    check_merged(tmp_path, base, other)


def test_seq2seq_trainer(models, tmp_path):
    with seeded(0):
        config = T5Config(
            vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    other = save_fine_tune(tmp_path / "base", tmp_path / "other", seed=1)
    ids = torch.arange(5, 11)
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 4

    generated = []

    def first_token(prediction):
        generated.append(prediction.predictions)
        return {"first_token": float(prediction.predictions[0, 1])}

    trainer = Seq2SeqTrainer(
        load(tmp_path / "base"),
        Seq2SeqTrainingArguments(
            str(tmp_path / "run"), predict_with_generate=True, generation_max_length=6, **SETTINGS
        ),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=first_token,
        callbacks=[NeuroMergeCallback([other])],
    )
    trainer.train()
    (merged,) = logged(trainer, "merged_eval_loss")
    model = AutoMergedModel.from_pretrained(tmp_path / "run" / MERGED)
    expected = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=5)
    assert generated[-1][0, : expected.shape[1]].tolist() == expected[0].tolist(), "the last one is the merged model's"
    assert merged["merged_eval_first_token"] == expected[0, 1]
    assert {result.metric for result in load_report(tmp_path / "run" / MERGED).results} == {"loss", "first_token"}
