"""Models with different vocabularies: rows are brought together by the text of their tokens.

The yardstick is written with dictionaries, a token's text at a time, and shares nothing with the package but the names
of the parameters: `by_text` of a model is what its embeddings say of each token.
"""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import reference
from families import assert_merged_as_reference, assert_same_bits, state
from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge, merge_recipe, plan_merge
from neuromerge_hf.cli import app
from neuromerge_hf.sources.aligned import runs
from tiny_models import contents, disturb, load, seeded

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
CHAT = [AddedToken("<|user|>", special=True), AddedToken("<|end|>", special=True)]
TOOL = [AddedToken("<|tool|>", special=True), AddedToken("covid", special=False)]
GIVES_BACK = NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
CPU = {"device": "cpu", "threads": 2}

IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
DECODER = {
    **IDS,
    "hidden_size": 18,
    "intermediate_size": 22,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
}
ENCODER = {"hidden_size": 18, "intermediate_size": 26, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {**DECODER, "tie_word_embeddings": False}),
    "llama-tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {**DECODER, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {**DECODER, "tie_word_embeddings": True}),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {**ENCODER, "pad_token_id": 0}),
    "bart": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig,
        {
            **IDS,
            "d_model": 18,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 26,
            "decoder_ffn_dim": 26,
            "max_position_embeddings": 32,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 3,
        },
    ),
}


def make_tokenizer(words=WORDS, added=()) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.add_tokens(list(added))
    return made


def random_model(family: str, rows: int, seed: int):
    model_class, config_class, settings = FAMILIES[family]
    with seeded(seed):
        model = model_class(config_class(**settings, vocab_size=rows)).eval()
        disturb(model)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.shape[-1] == rows:
                buffer += torch.randn_like(buffer)  # BART's final_logits_bias
    return model


def save(model, folder: Path, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def fine_tune(model, seed: int):
    with seeded(seed):
        disturb(model)
    return model


def grown(folder: Path, rows: int, seed: int):
    """The base with more rows, all of them trained."""
    model = load(folder)
    with seeded(seed):
        model.resize_token_embeddings(rows, mean_resizing=False)
        disturb(model)
    return model


def token_axis(name: str, tensor: Tensor, rows: int) -> int | None:
    """Where a parameter has a row for each token. No other dimension has this size here."""
    return tensor.shape.index(rows) if rows in tensor.shape else None


def by_text(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The row of each token, of each parameter that has them."""
    model, tokenizer = load(folder), tokenizer_of(folder)
    rows = model.config.vocab_size
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state(model).items():
        axis = token_axis(name, tensor, rows)
        if axis is not None:
            found[name] = {
                token: tensor.select(axis, row) for token, row in tokenizer.get_vocab().items() if row < rows
            }
    assert found
    return found


def in_rows_of(target: Path, folder: Path, base: Path) -> dict[str, Tensor]:
    """A model's state as it would be with the target's vocabulary; a token that it lacks has the base's row, if any."""
    model, target_model = load(folder), load(target)
    theirs, bases = by_text(folder), by_text(base)
    wanted = tokenizer_of(target).get_vocab()
    moved = state(model)
    for name in theirs:
        like = state(target_model)[name]
        axis = token_axis(name, like, target_model.config.vocab_size)
        moved[name] = like.clone()
        for token, row in wanted.items():
            source = theirs[name].get(token, bases[name].get(token))
            if source is not None:
                moved[name].select(axis, row).copy_(source)
    return moved


def permuted(words, seed: int) -> list[str]:
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [words[i] for i in order]


def logits(model, ids: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits


def tokenizer_of(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


class Models:
    """A base with two rows of padding, and experts whose tokenizers differ from its own, made when asked for."""

    def __init__(self, family: str, root: Path):
        self.family, self.root = family, root

    def __truediv__(self, name: str) -> Path:
        if not (self.root / name).exists():
            getattr(self, f"_{name}")(self.root / name)
        return self.root / name

    def _base(self, folder: Path) -> None:
        save(random_model(self.family, len(WORDS) + 2, 0), folder, make_tokenizer())

    def _plain(self, folder: Path) -> None:
        save(fine_tune(load(self / "base"), 1), folder)

    def _chat(self, folder: Path) -> None:
        save(grown(self / "base", len(WORDS) + 5, 2), folder, make_tokenizer(added=CHAT))

    def _tools(self, folder: Path) -> None:
        save(grown(self / "base", len(WORDS) + 5, 3), folder, make_tokenizer(added=[*TOOL, CHAT[1]]))

    def _shuffled(self, folder: Path) -> None:
        """Another order, one word less, and other numbers of the special tokens."""
        words = permuted(WORDS[:-1], 4)
        model = random_model(self.family, len(words), 5)
        for config in (model.config, getattr(model, "generation_config", model.config)):
            for name, token in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"), ("pad_token_id", "[PAD]")):
                if name in FAMILIES[self.family][2]:
                    setattr(config, name, words.index(token))
        save(model, folder, make_tokenizer(words))


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    made: dict[str, Models] = {}
    return lambda family: made.setdefault(family, Models(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def models(models_of) -> Models:
    return models_of("llama")


# The merged model against the direct form


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
    report = merge(experts, merged, base_model=base, tokenizer=tokenizer, **CPU)
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


def test_neither_blocks_nor_threads_change_a_byte(models, tmp_path, monkeypatch):
    experts = [models / "shuffled", models / "tools", models / "plain"]
    for name, entries, threads in (("one", 1 << 20, 1), ("many", 48, 3)):
        monkeypatch.setattr("neuromerge_hf.engine.merge.BLOCK_ENTRIES", entries)
        monkeypatch.setattr("neuromerge_hf.engine.thresholds.BLOCK_ENTRIES", entries)
        options = {"base_model": models / "base", "tokenizer": "union", "threads": threads, "device": "cpu"}
        config = NeuroMergingConfig(exclude=("lm_head.*",))
        merge(experts, tmp_path / name, config=config, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


# Rows of one model alone


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


# Nothing changes where nothing differs


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


# Adapters


def save_resized_adapter(base: Path, folder: Path, tokenizer=None, *, rows: int | None = None, **options):
    """A LoRA adapter on the base with more rows, trained together with the embeddings; returns the trained model."""
    rows = rows or len(WORDS) + 5
    model = load(base)
    with seeded(11), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # PEFT's advice
        model.resize_token_embeddings(rows, mean_resizing=False)
        disturb(model.get_input_embeddings())
        if not model.config.tie_word_embeddings:
            disturb(model.get_output_embeddings())
        adapted = get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **options}))
        disturb(adapted, trainable_only=True)
    adapted.save_pretrained(folder, save_embedding_layers=True)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return adapted.eval()


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


# Special tokens, settings


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
        [tmp_path / "expert"], tokenizer="expert", head="expert", cache_dir=tmp_path / "cache", **options
    )
    ids = [[1, 12, 13, 5, 12, 12]]
    torch.testing.assert_close(logits(model, ids), logits(expert, ids), rtol=0, atol=1e-5)
    model = AutoMergedModel.from_pretrained(
        [tmp_path / "expert"], head="expert", cache_dir=tmp_path / "cache", **options
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


# How it is asked for


def test_the_recipe_and_the_command_line_reproduce_every_byte(models, tmp_path):
    experts = [models / "chat", models / "tools"]
    for tokenizer in ("union", "chat", str(models / "tools")):
        first, second, third = (tmp_path / Path(tokenizer).name / name for name in ("first", "second", "third"))
        merge(experts, first, base_model=models / "base", tokenizer=tokenizer)
        merge_recipe(first / "recipe.yaml", second)
        arguments = [*experts, "--base-model", models / "base", "--tokenizer", tokenizer, "--output", third]
        done = CliRunner().invoke(app, ["merge", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        assert "aligned with the base's" in done.stdout
        assert contents(first) == contents(second) == contents(third)
        for name, data in contents(first).items():
            assert str(tmp_path).encode() not in data, name
            assert name == "recipe.yaml" or str(models.root).encode() not in data, name


def test_a_recipe_notices_another_tokenizer_of_an_expert(models, tmp_path):
    expert = shutil.copytree(models / "chat", tmp_path / "chat")
    merge([expert], tmp_path / "merged", base_model=models / "base")
    make_tokenizer(added=TOOL).save_pretrained(expert)
    with pytest.raises(MergeError, match=r"chat/tokenizer\.json has changed"):
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")


def test_each_tokenizer_has_its_own_merge_in_the_cache(models, tmp_path):
    def rows(**options) -> int:
        experts, options = [models / "chat", models / "tools"], {"base_model": models / "base", **options}
        return AutoMergedModel.from_pretrained(experts, cache_dir=tmp_path, **options).config.vocab_size

    assert (rows(), rows(tokenizer="union"), rows(tokenizer="chat")) == (14, 16, 17)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_expert_on_the_hub_is_chosen_by_its_id(hub, models, tmp_path):
    hub.add_folder("vocabularies/chat", models / "chat")
    for name, tokenizer in (("id", "vocabularies/chat"), ("revision", "vocabularies/chat@main"), ("name", "chat")):
        merge(["vocabularies/chat@main"], tmp_path / name, base_model=models / "base", tokenizer=tokenizer, **CPU)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == ((models / "chat") / "tokenizer.json").read_bytes()
        merge_recipe(tmp_path / name / "recipe.yaml", tmp_path / f"{name}-again")


# What is refused


def refused(experts, match: str, **options) -> None:
    with pytest.raises(MergeError, match=match):
        plan_merge(experts, **options)


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
    model = AutoMergedModel.from_pretrained(merged, head="chat", cache_dir=tmp_path / "cache")
    ids = [list(range(6, 14))]
    torch.testing.assert_close(logits(model, ids), logits(load(bert / "chat"), ids), rtol=0, atol=1e-5)


# Reading


def test_runs_are_the_longest_stretches_that_count_up():
    rows = torch.tensor([4, 5, 6, -1, 0, 1, -1, -1, 9, 3, 2])
    assert list(runs(rows)) == [(0, 3, 4), (4, 6, 0), (8, 9, 9), (9, 10, 3), (10, 11, 2)]
    assert list(runs(torch.tensor([-1, -1]))) == []
