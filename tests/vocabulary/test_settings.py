"""Settings that speak of tokens fit the merged vocabulary: special tokens, heads, nested sizes, chat templates."""

import json
import shutil
from pathlib import Path

import torch
import transformers

from families import GIVES_BACK
from neuromerge_hf import AutoMergedModel, merge, merge_recipe
from tiny_models import contents, disturb, load, seeded
from vocabularies import (
    CHAT,
    CPU,
    DECODER,
    ENCODER,
    WORDS,
    logits,
    make_tokenizer,
    permuted,
    refused,
    save,
    save_resized_adapter,
    tokenizer_of,
)


def test_ids_of_special_tokens_are_those_of_the_chosen_tokenizer(models, tmp_path):
    base = shutil.copytree(models / "base", tmp_path / "base")
    settings = {"eos_token_id": [3, 4, 13], "bos_token_id": 2, "pad_token_id": -1, "suppress_tokens": [5], "top_k": 3}
    (base / "generation_config.json").write_text(json.dumps(settings))
    order = permuted(WORDS, 9)
    save_resized_adapter(base, tmp_path / "adapter", make_tokenizer(order), rows=len(WORDS))
    merge([tmp_path / "adapter"], tmp_path / "merged", base_model=base, tokenizer="adapter", **CPU)
    number = {word: row for row, word in enumerate(order)}
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == {
        "eos_token_id": [number["</s>"], number["the"], 13],  # 13 is no token of the base
        "bos_token_id": number["<s>"],
        "pad_token_id": -1,
        "suppress_tokens": [number["quick"]],
        "top_k": 3,
    }
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == len(WORDS)
    assert (config["bos_token_id"], config["pad_token_id"]) == (number["<s>"], number["[PAD]"])


def test_the_head_of_an_expert_fits_the_merged_vocabulary(models, tmp_path):
    with seeded(21):
        expert = load(models / "chat", "LlamaForSequenceClassification", num_labels=3)
        expert.config.pad_token_id = 12
        disturb(expert)
    save(expert, tmp_path / "expert", make_tokenizer(added=CHAT))
    headless = save(load(models / "base", "LlamaModel"), tmp_path / "base", make_tokenizer())
    options = {"base_model": headless, "config": GIVES_BACK}
    model = AutoMergedModel.from_pretrained(
        [tmp_path / "expert"], tokenizer="expert", head="expert", merge_cache_dir=tmp_path / "cache", **options
    )
    ids = [[1, 12, 13, 5, 12, 12]]
    torch.testing.assert_close(logits(model, ids), logits(expert, ids), rtol=0, atol=1e-5)
    model = AutoMergedModel.from_pretrained(
        [tmp_path / "expert"], head="expert", merge_cache_dir=tmp_path / "cache", **options
    )
    assert (model.config.vocab_size, model.config.pad_token_id) == (len(WORDS) + 2, None)
    ids = [[1, 5, 7, 8]]
    torch.testing.assert_close(logits(model, ids), logits(expert, ids), rtol=0, atol=1e-5)


def test_a_nested_text_configuration_gets_the_new_size(tmp_path):
    text = transformers.LlamaConfig(**{**DECODER, "vocab_size": len(WORDS), "tie_word_embeddings": False})
    vision = {**ENCODER, "image_size": 8, "patch_size": 4, "projection_dim": 18}
    with seeded(0):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**vision), text_config=text, image_token_id=11
            )
        )
    base = save(model, tmp_path / "base", make_tokenizer())
    with seeded(1):
        model.resize_token_embeddings(len(WORDS) + 2, mean_resizing=False)
        disturb(model)
    save(model, tmp_path / "expert", make_tokenizer(added=CHAT))
    options = {"base_model": base, "config": GIVES_BACK, "tokenizer": "expert", **CPU}
    merge([tmp_path / "expert"], tmp_path / "merged", **options)
    merged = load(tmp_path / "merged")
    assert merged.config.text_config.vocab_size == len(WORDS) + 2
    ids = [list(range(6)), [7, 8, 9, 10, 12, 13]]
    torch.testing.assert_close(logits(merged, ids), logits(model.eval(), ids), rtol=0, atol=1e-5)


def test_a_chat_template_comes_with_the_tokenizer_or_is_chosen(models, tmp_path):
    def with_template(name: str, text: str, *, file: bool) -> Path:
        folder = shutil.copytree(models / name, tmp_path / name)
        tokenizer = tokenizer_of(folder)
        tokenizer.chat_template = text
        tokenizer.save_pretrained(folder, save_jinja_files=file)
        return folder

    base, chat = with_template("base", "of the base", file=False), with_template("chat", "of the chat", file=True)
    tools = shutil.copytree(models / "tools", tmp_path / "tools")
    assert not list(base.glob("*.jinja"))
    experts = [chat, tools]

    def template(name: str, **options) -> str | None:
        merge(experts, tmp_path / "merged" / name, base_model=base, **options, **CPU)
        merge_recipe(tmp_path / "merged" / name / "recipe.yaml", tmp_path / "again" / name)
        assert contents(tmp_path / "again" / name) == contents(tmp_path / "merged" / name)
        return tokenizer_of(tmp_path / "merged" / name).chat_template

    assert template("default") == "of the base"
    assert template("tokenizer", tokenizer="chat") == "of the chat"
    assert template("none", tokenizer="tools") is None
    assert template("union", tokenizer="union") == "of the base"
    assert template("chosen", chat_template="chat") == "of the chat"
    assert template("both", tokenizer="chat", chat_template="base") == "of the base"
    assert template("union-chosen", tokenizer="union", chat_template=str(chat)) == "of the chat"
    refused(experts, "tools has no chat template", base_model=base, chat_template="tools")
    match = r'chat_template must be "base" or the name of one expert \(chat, tools\), not \'x\''
    refused(experts, match, base_model=base, chat_template="x")
