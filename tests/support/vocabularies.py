"""Models with tokenizers of their own, and the rows of their embeddings by token.

The rows of two models are compared by the texts of the tokens. This module shares no code with the package.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import state
from neuromerge_hf import MergeError, plan_merge
from tiny_models import disturb, load, seeded

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
CHAT = [AddedToken("<|user|>", special=True), AddedToken("<|end|>", special=True)]
TOOL = [AddedToken("<|tool|>", special=True), AddedToken("covid", special=False)]
CPU: dict[str, Any] = {"device": "cpu", "threads": 2}
IDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}

DECODER: dict[str, Any] = {
    **IDS,
    "hidden_size": 18,
    "intermediate_size": 22,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
}
ENCODER: dict[str, Any] = {"hidden_size": 18, "intermediate_size": 26, "num_hidden_layers": 1, "num_attention_heads": 2}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
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


def make_tokenizer(words: Sequence[str] = WORDS, added: Sequence[AddedToken | str] = ()) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.add_tokens(list(added))
    return made


def random_model(family: str, rows: int, seed: int) -> PreTrainedModel:
    model_class, config_class, settings = FAMILIES[family]
    with seeded(seed):
        model: PreTrainedModel = model_class(config_class(**settings, vocab_size=rows)).eval()
        disturb(model)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.shape[-1] == rows:
                buffer += torch.randn_like(buffer)  # BART's final_logits_bias
    return model


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def fine_tune(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Add noise to a model in place, and return the model."""
    with seeded(seed):
        disturb(model)
    return model


def grown(folder: Path, rows: int, seed: int) -> PreTrainedModel:
    """The base with more rows in its embeddings, and noise on all weights."""
    model = load(folder)
    with seeded(seed):
        model.resize_token_embeddings(rows, mean_resizing=False)
        disturb(model)
    return model


def token_axis(name: str, tensor: Tensor, rows: int) -> int | None:
    """The axis of a parameter that numbers tokens; None without one. No other dimension has this size here."""
    return tensor.shape.index(rows) if rows in tensor.shape else None


def by_text(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The row of each token, by the parameter's name and the token's text."""
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
    """A model's state with the target's vocabulary. A token that the model lacks has the base's row, if any."""
    model, target_model = load(folder), load(target)
    theirs, bases = by_text(folder), by_text(base)
    wanted = tokenizer_of(target).get_vocab()
    moved = state(model)
    for name in theirs:
        like = state(target_model)[name]
        axis = like.shape.index(target_model.config.vocab_size)
        moved[name] = like.clone()
        for token, row in wanted.items():
            source = theirs[name].get(token, bases[name].get(token))
            if source is not None:
                moved[name].select(axis, row).copy_(source)
    return moved


def permuted(words: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [words[i] for i in order]


def logits(model: torch.nn.Module, ids: list[list[int]]) -> Tensor:
    """The logits of a model for some token ids."""
    with torch.no_grad():
        answer: Tensor = model(input_ids=torch.tensor(ids)).logits
    return answer


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


class Models:
    """A base with two rows of padding, and experts with other tokenizers. Each is made when it is first used."""

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
        """An expert with words in another order, one word fewer, and other ids for the special tokens."""
        words = permuted(WORDS[:-1], 4)
        model = random_model(self.family, len(words), 5)
        for config in (model.config, getattr(model, "generation_config", model.config)):
            for name, token in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"), ("pad_token_id", "[PAD]")):
                if name in FAMILIES[self.family][2]:
                    setattr(config, name, words.index(token))
        save(model, folder, make_tokenizer(words))


def save_resized_adapter(
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    rows: int | None = None,
    **options: Any,
) -> PeftModel:
    """Save a LoRA adapter that was trained with resized embeddings of the base, and return the trained model."""
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
    adapted.save_pretrained(str(folder), save_embedding_layers=True)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return adapted.eval()


def refused(experts: Sequence[Path], match: str, **options: Any) -> None:
    """Assert that planning a merge of some experts fails with a matching message."""
    with pytest.raises(MergeError, match=match):
        plan_merge(experts, **options)
