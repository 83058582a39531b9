"""Vocabularies that cannot be brought together are refused with a reason and a way out."""

import re
import shutil

import torch
from peft import LoraConfig, get_peft_model

from families import GIVES_BACK
from neuromerge_hf import AutoMergedModel, merge, plan_merge
from tiny_models import load
from vocabularies import (
    CHAT,
    CPU,
    WORDS,
    fine_tune,
    grown,
    logits,
    make_tokenizer,
    permuted,
    random_model,
    refused,
    save,
    save_resized_adapter,
)


def test_an_unknown_tokenizer_is_refused(models):
    message = 'tokenizer must be "base", "union" or the name of one expert (chat, tools), not \'math\''
    refused([models / "chat", models / "tools"], re.escape(message), base_model=models / "base", tokenizer="math")


def test_a_chosen_model_without_tokenizer_files_is_refused(models):
    match = r"tokenizer='plain', but .*plain has no tokenizer files"
    refused([models / "plain"], match, base_model=models / "base", tokenizer="plain")


def test_more_rows_without_tokenizer_files_are_refused(models, tmp_path):
    save(grown(models / "base", 20, 1), tmp_path / "grown")
    match = r"vocabularies differ.*\(20, 18\).*\(14, 18\).*tokenizer files"
    refused([tmp_path / "grown"], match, base_model=models / "base")
    bare = save(load(models / "base"), tmp_path / "bare")
    refused([models / "chat"], match.replace("20", "17"), base_model=bare)


def test_other_tokens_than_a_base_without_tokenizer_files_may_have_are_refused(models, tmp_path):
    bare = save(load(models / "base"), tmp_path / "bare")
    experts = []
    for name, order in (("one", WORDS), ("two", permuted(WORDS, 3))):
        experts.append(save(fine_tune(load(bare), 1), tmp_path / name, make_tokenizer(order)))
    refused(experts, r"vocabularies differ.*the base .*bare has 14 rows and no tokenizer files", base_model=bare)
    assert plan_merge(experts[:1], base_model=bare).tokenizer.alignment is None


def test_a_damaged_tokenizer_is_refused(models, tmp_path):
    expert = shutil.copytree(models / "chat", tmp_path / "chat")
    (expert / "tokenizer.json").write_text("{")
    refused([expert], r"tokenizer files of .*chat cannot be read", base_model=models / "base")


def test_a_union_with_words_of_another_tokenizers_own_model_is_refused(models, tmp_path):
    words = [*WORDS, "wolf", "bear"]
    expert = save(random_model("llama", 14, 1), tmp_path / "wild", make_tokenizer(words))
    match = r"wild has 2 tokens that the base .* lacks .*\('wolf', 'bear', ...\).*Use tokenizer='wild'"
    refused([expert], match, base_model=models / "base", tokenizer="union")


def test_an_adapter_whose_tokens_moved_without_its_embeddings_is_refused(models, tmp_path):
    adapted = get_peft_model(load(models / "base"), LoraConfig(r=3, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer(permuted(WORDS, 3)).save_pretrained(tmp_path / "adapter")
    match = r"adapter does not store model.embed_tokens.weight whole.*save_embedding_layers=True"
    refused([tmp_path / "adapter"], match, base_model=models / "base")


def test_tokens_for_which_no_model_has_a_row_are_refused(models, tmp_path):
    headless = save(load(models / "chat", "LlamaModel"), tmp_path / "headless", make_tokenizer(added=CHAT))
    match = r"The base .*base lacks the token '<\|user\|>', and no expert that has it stores lm_head.weight"
    refused([headless], match, base_model=models / "base", tokenizer="headless")
    assert plan_merge([headless], base_model=models / "base").tokenizer.alignment is not None
    targets = {"target_modules": ["lm_head", "q_proj"]}  # PEFT stores the embeddings of the head, and no others
    save_resized_adapter(models / "base", tmp_path / "adapter", make_tokenizer(added=CHAT), **targets)
    match = r"lacks the padding in row 14, and no expert that has it stores model.embed_tokens.weight"
    refused([tmp_path / "adapter"], match, base_model=models / "base", tokenizer="adapter")


def test_an_own_head_with_a_row_for_each_token_is_refused(models_of, tmp_path):
    bert = models_of("bert")
    headless = save(load(bert / "base", "BertModel"), tmp_path / "base", make_tokenizer())
    match = r"chat has a head of its own with a row for each of its tokens.*Use tokenizer='chat'"
    refused([bert / "chat"], match, base_model=headless)
    merged = tmp_path / "merged"
    merge([bert / "chat"], merged, base_model=headless, tokenizer="chat", config=GIVES_BACK, **CPU)
    model = AutoMergedModel.from_pretrained(merged, head="chat", merge_cache_dir=tmp_path / "cache")
    ids = [list(range(6, 14))]
    torch.testing.assert_close(logits(model, ids), logits(load(bert / "chat"), ids), rtol=0, atol=1e-5)
