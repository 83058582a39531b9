"""Tiny real models, fine-tunes and adapters with fixed seeds, saved by transformers and PEFT themselves.

Each model is a folder. Nothing is trained: random noise serves as task vectors.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers in the block, and restore their state after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def save_llama(folder: Path, *, seed: int = 0, dtype: str = "float32", shard: str = "1GB", **changes: Any) -> Path:
    """Save a Llama with two layers, grouped queries and a tokenizer: 13 thousand parameters."""
    settings: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    with seeded(seed):
        model = transformers.LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def save_bert(folder: Path, model_class: str = "BertModel", *, seed: int = 0, **changes: Any) -> Path:
    """Save a BERT with two layers and a tokenizer: 11 thousand parameters."""
    settings: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    with seeded(seed):
        getattr(transformers, model_class)(BertConfig(**(settings | changes))).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


@torch.no_grad()
def disturb(model: torch.nn.Module, *, trainable_only: bool = False, scale: float = 0.05) -> None:
    """Add noise to the parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad or not trainable_only:
            parameter.add_(torch.randn_like(parameter) * scale)


def save_fine_tune(
    base: Path, folder: Path, *, seed: int, model_class: str | None = None, shard: str = "1GB", **changes: Any
) -> Path:
    """Save a full fine-tune of a base as `model_class` (default: the base's). `changes` go to its configuration."""
    with seeded(seed):
        model = load(base, model_class, **changes)
        disturb(model)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_llamas(root: Path, *, shard: str = "1GB") -> Path:
    """Save a Llama as "base", a fine-tune "math" and an adapter "code" of it, in a folder. `shard` is of the base."""
    base = save_llama(root / "base", shard=shard)
    save_fine_tune(base, root / "math", seed=1)
    save_adapter(base, root / "code", seed=2)
    return root


def save_mixed(root: Path) -> Path:
    """Save a Llama as "base", its full fine-tunes "math" and "code" and an adapter "lora" of it, in a folder."""
    base = save_llama(root / "base")
    for seed, name in enumerate(("math", "code"), start=1):
        save_fine_tune(base, root / name, seed=seed)
    save_adapter(base, root / "lora", seed=3)
    return root


def save_classifiers(root: Path) -> Path:
    """Save a BERT as "encoder", and its classifiers "topics" (3 labels) and "moods" (5 labels), in a folder."""
    base = save_bert(root / "encoder")
    save_fine_tune(base, root / "topics", seed=3, model_class="BertForSequenceClassification", num_labels=3)
    save_fine_tune(base, root / "moods", seed=4, model_class="BertForSequenceClassification", num_labels=5)
    return root


def save_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int,
    model_class: str | None = None,
    num_labels: int | None = None,
    **options: Any,
) -> Path:
    """Save a LoRA adapter of a base. `options` go to its LoraConfig."""
    changes = {} if num_labels is None else {"num_labels": num_labels}
    with seeded(seed):
        model = load(base, model_class, **changes)
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        adapted = get_peft_model(model, LoraConfig(**(settings | options)))
        disturb(adapted, trainable_only=True)
    adapted.save_pretrained(str(folder))
    return folder


def load(folder: Path | str, model_class: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a model with plain transformers."""
    name = model_class or transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder, **kwargs)
    return model


def load_adapted(base: Path, adapter: Path, model_class: str | None = None, **kwargs: Any) -> PeftModel:
    """Load an adapter on its base with PEFT."""
    return PeftModel.from_pretrained(load(base, model_class, **kwargs), adapter).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """A model's logits for a fixed input, or its hidden states if it has no head."""
    output = model(input_ids=torch.arange(1, 13).view(2, 6))
    return output["logits"] if "logits" in output else output["last_hidden_state"]


NOT_REPRODUCIBLE = ("merge_report.json", "README.md", "neuromerge.png")
"""Files that record the time and place of a merge. All others are the same when the merge is repeated."""


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every reproducible file of a merge, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_REPRODUCIBLE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def merged_folder(model: Any) -> Path:
    """The folder of the merge that a model was loaded from."""
    folder: Path = model._origin.location.folder
    return folder
