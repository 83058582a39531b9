"""Adapters that were trained with more tokens than the base has are merged as full fine-tunes are."""

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file

from families import GIVES_BACK
from neuromerge_hf import merge
from tiny_models import disturb, load
from vocabularies import CHAT, CPU, WORDS, by_text, logits, make_tokenizer, refused, save_resized_adapter

RESIZED = {
    "stored": ("llama", {}),
    "LoRA of the embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "DoRA of the embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "modules to save": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "trained tokens": ("llama", {"trainable_token_indices": {"embed_tokens": [12, 13]}}),
    "tied, stored": ("llama-tied", {}),
    "tied, LoRA of the embeddings": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, modules to save": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize(("family", "options"), RESIZED.values(), ids=RESIZED)
def test_an_adapter_with_resized_embeddings_is_given_back(models_of, tmp_path, family, options):
    models = models_of(family)
    trained = save_resized_adapter(models / "base", tmp_path / "adapter", make_tokenizer(added=CHAT), **options)
    options = {"base_model": models / "base", "config": GIVES_BACK, "tokenizer": "adapter", **CPU}
    merge([tmp_path / "adapter"], tmp_path / "merged", **options)
    ids = [list(range(1, 9)), list(range(6, 14))]
    torch.testing.assert_close(logits(load(tmp_path / "merged"), ids), logits(trained, ids), rtol=0, atol=1e-4)
    config = load(tmp_path / "merged").config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (len(WORDS) + 5, 2, 3)


def test_a_resized_adapter_that_is_computed_in_the_whole_model_is_refused(models, tmp_path):
    model = load(models / "base")
    model.resize_token_embeddings(len(WORDS) + 5, mean_resizing=False)
    adapted = get_peft_model(model, VeraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    make_tokenizer(added=CHAT).save_pretrained(tmp_path / "adapter")
    match = r"adapter is of type VERA, which PEFT computes in the whole model at once, and has another number of tokens"
    refused([tmp_path / "adapter"], match, base_model=models / "base")


def test_a_full_expert_and_a_resized_adapter_are_merged_by_text(models, tmp_path):
    save_resized_adapter(models / "base", tmp_path / "adapter", make_tokenizer(added=[CHAT[1], CHAT[0]]))
    options = {"base_model": models / "base", "tokenizer": "union", **CPU}
    merge([models / "chat", tmp_path / "adapter"], tmp_path / "merged", **options)
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    made, chat = by_text(tmp_path / "merged")["lm_head.weight"], by_text(models / "chat")["lm_head.weight"]
    torch.testing.assert_close(made["<|end|>"], (chat["<|end|>"] + rows[len(WORDS)]) / 2)


def test_an_adapters_new_tokens_on_the_bases_padding_stay_there(models, tmp_path):
    """As with Qwen: tokens are added to the tokenizer, but the embeddings have room and are not trained."""
    adapted = get_peft_model(load(models / "base"), LoraConfig(r=3, target_modules=["q_proj"]))
    disturb(adapted, trainable_only=True)
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer(added=CHAT).save_pretrained(tmp_path / "adapter")
    options = {"base_model": models / "base", "config": GIVES_BACK, **CPU}
    ids = [list(range(6, 14))]
    for tokenizer in ("base", "adapter", "union"):
        merged = tmp_path / f"merged-{tokenizer}"
        merge([tmp_path / "adapter"], merged, tokenizer=tokenizer, **options)
        got = logits(load(merged), ids)
        torch.testing.assert_close(got, logits(adapted.eval(), ids), rtol=0, atol=1e-5)
