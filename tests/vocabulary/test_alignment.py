"""Models with different vocabularies are merged by the text of their tokens, not by the numbers of their rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import reference
from engine_runs import merged_weights
from families import GIVES_BACK, assert_merged_as_reference, state
from neuromerge_hf import NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.sources.aligned import runs
from tiny_models import contents, load
from vocabularies import (
    CPU,
    FAMILIES,
    WORDS,
    by_text,
    fine_tune,
    in_rows_of,
    logits,
    make_tokenizer,
    permuted,
    random_model,
    save,
    token_axis,
    tokenizer_of,
)


def assert_merged_by_text(merged: Path, base: Path, experts: list[Path], report) -> None:
    """The merged model is what the reference makes of the models whose rows were put in its order one by one."""
    tokens, rows = tokenizer_of(merged).get_vocab(), load(merged).config.vocab_size
    bases, others = by_text(base), [by_text(expert) for expert in experts]
    start = in_rows_of(merged, base, base)
    moved = [in_rows_of(merged, expert, base) for expert in experts]
    for name in bases:
        axis = token_axis(name, start[name], rows)
        known = torch.zeros(rows, dtype=torch.bool)
        for token, row in tokens.items():
            known[row] = token in bases[name]
            having = [other[name][token] for other in others if token in other[name]]
            if having and not known[row]:
                start[name].select(axis, row).copy_(torch.stack(having).mean(0))
        known = known.view([-1 if i == axis else 1 for i in range(start[name].ndim)])
        for model in moved:  # a row that the base lacks is no one's change, and neither is padding
            model[name] = torch.where(known, model[name], start[name])
    shapes = {name: tensor.ndim == 2 and len(tensor) > 1 for name, tensor in start.items()}
    neurons = {name: reference.LINEAR if is_matrix else None for name, is_matrix in shapes.items()}
    assert_merged_as_reference(state(load(merged)), report, start, moved, neurons)


CASES = [(family, tokenizer) for family in FAMILIES for tokenizer in ("shuffled", "union")]


@pytest.mark.parametrize(("family", "tokenizer"), [("llama", "base"), ("llama", "chat"), *CASES])
def test_rows_are_merged_by_the_text_of_their_tokens(models_of, tmp_path, family, tokenizer):
    models = models_of(family)
    experts = [models / "chat", models / "tools", models / "shuffled"]
    merged, base = tmp_path / "merged", models / "base"
    config = NeuroMergingConfig()
    report = merge(experts, merged, base_model=base, config=config, tokenizer=tokenizer, **CPU)
    assert_merged_by_text(merged, base, experts, report)
    if tokenizer != "union":
        chosen = models / tokenizer
        assert tokenizer_of(merged).get_vocab() == tokenizer_of(chosen).get_vocab()
        assert load(merged).config.vocab_size == load(chosen).config.vocab_size


@pytest.mark.parametrize("expert", ["chat", "shuffled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_given_back_with_its_own_tokenizer(models_of, tmp_path, family, expert):
    models = models_of(family)
    merged = tmp_path / "merged"
    merge([models / expert], merged, base_model=models / "base", config=GIVES_BACK, tokenizer=expert, **CPU)
    ids = [list(range(1, 9)), list(range(3, 11))]
    torch.testing.assert_close(logits(load(merged), ids), logits(load(models / expert), ids), rtol=0, atol=1e-5)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (merged, models / expert)]
    assert settings[0] == settings[1]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / file).read_bytes() == (models / expert / file).read_bytes()
    if (models / expert / "generation_config.json").exists():
        settings = [json.loads((folder / "generation_config.json").read_text()) for folder in (merged, models / expert)]
        assert settings[0] == settings[1]


def test_the_order_of_an_experts_tokens_does_not_matter(tmp_path):
    words = permuted(WORDS, 7)
    base = save(random_model("llama", len(WORDS), 0), tmp_path / "base", make_tokenizer())
    other = save(fine_tune(load(base), 1), tmp_path / "other")
    expert = fine_tune(load(base), 6)
    save(expert, tmp_path / "ordered", make_tokenizer())
    for module in (expert.get_input_embeddings(), expert.get_output_embeddings()):
        rows = module.weight.data.clone()
        for row, word in enumerate(words):
            module.weight.data[row] = rows[WORDS.index(word)]
    save(expert, tmp_path / "permuted", make_tokenizer(words))
    for name in ("ordered", "permuted"):
        merge([tmp_path / name, other], tmp_path / f"from-{name}", base_model=base, **CPU)
    made = [tmp_path / f"from-{name}" / "model.safetensors" for name in ("ordered", "permuted")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_neither_blocks_nor_threads_change_a_byte(models, tmp_path):
    experts = [models / "shuffled", models / "tools", models / "plain"]
    config = NeuroMergingConfig(exclude=("lm_head.*",))
    plan = plan_merge(experts, base_model=models / "base", config=config, tokenizer="union")
    one = merged_weights(plan, tmp_path / "one")
    many = merged_weights(plan, tmp_path / "many", threads=3, block_entries=48)
    assert one.files == many.files


def test_tokenizers_with_the_same_tokens_change_no_byte(models, tmp_path):
    plain = shutil.copytree(models / "plain", tmp_path / "models" / "plain")
    merge([plain], tmp_path / "without", base_model=models / "base", **CPU)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(plain)
    assert plan_merge([plain], base_model=models / "base").tokenizer.alignment is None
    report = merge([plain], tmp_path / "with", base_model=models / "base", **CPU)
    assert report.vocabulary is None
    made = [contents(tmp_path / name) for name in ("without", "with")]
    assert {name: data for name, data in made[0].items() if name != "recipe.yaml"} == {
        name: data for name, data in made[1].items() if name != "recipe.yaml"
    }
    merge([plain], tmp_path / "chosen", base_model=models / "base", tokenizer="plain", **CPU)
    assert (tmp_path / "chosen" / "model.safetensors").read_bytes() == made[0]["model.safetensors"]
    assert tokenizer_of(tmp_path / "chosen").chat_template == "{{ messages }}"


def test_tokens_without_a_row_do_not_count(models, tmp_path):
    model = random_model("llama", len(WORDS), 0)
    base = save(model, tmp_path / "base", make_tokenizer())
    expert = save(fine_tune(model, 1), tmp_path / "expert", make_tokenizer(added=["<pad>"]))
    assert plan_merge([expert], base_model=base).tokenizer.alignment is None


def test_tokenizers_that_are_the_bases_are_not_read(models, tmp_path, monkeypatch):
    plain = shutil.copytree(models / "plain", tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile((models / "base") / name, plain / name)
    monkeypatch.setattr("neuromerge_hf.vocabulary.tokenizer.load_tokenizer", None)
    assert plan_merge([plain], base_model=models / "base").tokenizer.alignment is None


def test_runs_are_the_longest_stretches_that_count_up():
    rows = torch.tensor([4, 5, 6, -1, 0, 1, -1, -1, 9, 3, 2])
    assert list(runs(rows)) == [(0, 3, 4), (4, 6, 0), (8, 9, 9), (9, 10, 3), (10, 11, 2)]
    assert list(runs(torch.tensor([-1, -1]))) == []
