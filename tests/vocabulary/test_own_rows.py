"""Rows that only some models have come from those models: added tokens, padding, and what is excluded."""

import pytest
import torch

from families import GIVES_BACK, assert_same_bits, state
from neuromerge_hf import NeuroMergingConfig, merge, plan_merge
from tiny_models import load
from vocabularies import CHAT, CPU, WORDS, by_text, grown, make_tokenizer, save, tokenizer_of


def test_a_union_has_the_bases_tokens_and_then_the_added_ones_of_each_expert(models, tmp_path):
    merged = tmp_path / "merged"
    experts = [models / "chat", models / "tools"]
    plan = plan_merge(experts, base_model=models / "base", tokenizer="union")
    report = merge(experts, merged, base_model=models / "base", tokenizer="union", **CPU)
    tokenizer = tokenizer_of(merged)
    added = ["<|user|>", "<|end|>", "<|tool|>", "covid"]
    assert tokenizer.get_vocab() == {token: row for row, token in enumerate([*WORDS, *added])}
    assert tokenizer("<|user|> fox covid <|end|>").input_ids == [12, 7, 15, 13]
    assert tokenizer.decode([12, 7, 15, 13], skip_special_tokens=True).split() == ["fox", "covid"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 3)
    assert "local" not in (merged / "tokenizer_config.json").read_text()
    model = load(merged)
    assert model.config.vocab_size == 16  # two of them on the base's padding
    found, chat, tools = by_text(merged), by_text(models / "chat"), by_text(models / "tools")
    for name, of_tokens in found.items():
        assert_same_bits(of_tokens["<|user|>"], chat[name]["<|user|>"])
        assert_same_bits(of_tokens["covid"], tools[name]["covid"])
        assert_same_bits(of_tokens["<|end|>"], (chat[name]["<|end|>"] + tools[name]["<|end|>"]) / 2)
    assert (report.vocabulary.tokens, report.vocabulary.rows) == (16, 16)
    assert (report.vocabulary.aligned, report.vocabulary.from_experts) == (12, 4)
    assert report.vocabulary.lacked == {"chat": 2, "tools": 1}
    says = "16 tokens in 16 rows: 12 aligned with the base's, 4 from the experts; chat lacks 2; tools lacks 1"
    assert says in str(plan)
    assert says in str(report)


@pytest.mark.parametrize("tokenizer", ["base", "chat"])
def test_padding_is_that_of_the_model_whose_tokenizer_it_is(models, tmp_path, tokenizer):
    experts = [models / "chat", models / "tools"]
    report = merge(experts, tmp_path / "merged", base_model=models / "base", tokenizer=tokenizer, **CPU)
    assert report.vocabulary.left_out == {
        "chat": 2 if tokenizer == "base" else 0,
        "tools": 3 if tokenizer == "base" else 2,
    }
    made, chosen = state(load(tmp_path / "merged")), state(load(models / tokenizer))
    first = len(tokenizer_of(models / tokenizer))
    assert first < len(chosen["lm_head.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert_same_bits(made[name][first:], chosen[name][first:])


def test_padding_of_another_expert_with_the_chosen_tokens_does_not_count(models, tmp_path):
    save(grown(models / "base", len(WORDS) + 5, 12), tmp_path / "twin", make_tokenizer(added=CHAT))
    experts = [models / "chat", tmp_path / "twin"]
    merge(experts, tmp_path / "merged", base_model=models / "base", tokenizer="chat", **CPU)
    made, chosen = (state(load(folder))["lm_head.weight"] for folder in (tmp_path / "merged", models / "chat"))
    assert_same_bits(made[len(WORDS) + 2 :], chosen[len(WORDS) + 2 :])


def test_padding_that_a_union_does_not_need_is_the_bases(models, tmp_path):
    save(grown(models / "base", len(WORDS) + 3, 13), tmp_path / "expert", make_tokenizer(added=CHAT[:1]))
    merge([tmp_path / "expert"], tmp_path / "merged", base_model=models / "base", tokenizer="union", **CPU)
    made, base, expert = (
        state(load(folder))["lm_head.weight"] for folder in (tmp_path / "merged", models / "base", tmp_path / "expert")
    )
    assert len(made) == len(base) == len(WORDS) + 2
    assert_same_bits(made[len(WORDS)], expert[len(WORDS)])
    assert_same_bits(made[len(WORDS) + 1], base[len(WORDS) + 1])


def test_padding_of_models_with_the_same_tokens_is_merged_by_its_number(models, tmp_path):
    save(grown(models / "base", len(WORDS) + 4, 8), tmp_path / "padded", make_tokenizer())
    merge([tmp_path / "padded"], tmp_path / "merged", base_model=models / "base", config=GIVES_BACK, **CPU)
    made, expert = state(load(tmp_path / "merged")), state(load(tmp_path / "padded"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(made[name], expert[name][: len(WORDS) + 2], rtol=0, atol=1e-6)


def test_excluded_embeddings_are_the_bases_by_the_text_of_their_tokens(models, tmp_path):
    config = NeuroMergingConfig(exclude=("*embed_tokens*",))
    options = {"base_model": models / "base", "config": config, "tokenizer": "shuffled", **CPU}
    merge([models / "shuffled"], tmp_path / "merged", **options)
    name = "model.embed_tokens.weight"
    made, base = by_text(tmp_path / "merged")[name], by_text(models / "base")[name]
    for token, row in made.items():
        assert_same_bits(row, base[token])
