"""Merges three LoRA experts of a language model, and lets the base, each expert and the merged model answer.

make chat
python examples/chat.py --method ties --prompts 150
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from chat_model import answer, load_tokenizer, save_base, share_right
from chat_skills import SKILLS, held_out
from peft import PeftModel
from transformers import LlamaForCausalLM

from neuromerge_hf import AutoMergedModel

EXPERTS = Path(__file__).with_name("chat_experts")
SETTINGS = {"method": "neuro_iso", "scale": 0.3}
"""The scale was chosen on validation prompts. Adapters of such a high learning rate get in each other's way."""

GENERAL = "What is the capital of France?"


def load_models(cache: Path, settings: dict[str, Any]) -> Iterator[tuple[str, LlamaForCausalLM]]:
    """Yield the base, the experts and the merged model, each with its name. One at a time is in memory."""
    base = save_base(cache)
    yield "base", LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for skill in SKILLS:
        expert = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), EXPERTS / skill)
        yield skill, expert.merge_and_unload().eval()
    experts = [EXPERTS / skill for skill in SKILLS]
    yield (
        "merged",
        AutoMergedModel.from_pretrained(
            experts, base_model=base, config=settings, merge_cache_dir=cache / "merged", dtype=torch.float32
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".data/chat"), help="the folder of the base")
    parser.add_argument("--method", help="another method, at its defaults")
    parser.add_argument("--questions", type=int, default=2, help="prompts of each skill that are answered in full")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts of each skill for the scores")
    options = parser.parse_args()
    tokenizer = load_tokenizer(save_base(options.cache).parent)
    prompts = [*(example for skill in SKILLS for example in held_out(skill, options.questions)), (GENERAL, "Paris")]
    examples = {skill: held_out(skill, options.prompts) for skill in SKILLS}

    answers: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    settings = {"method": options.method} if options.method else SETTINGS
    for name, model in load_models(options.cache, settings):
        answers[name] = [answer(model, tokenizer, prompt) for prompt, _ in prompts]
        scores[name] = [100 * share_right(model, tokenizer, examples[skill]) for skill in SKILLS]

    for number, (prompt, right) in enumerate(prompts):
        print(f"\n{prompt}\n  {'(right)':9}{right}")
        for name, given in answers.items():
            print(f"  {name:9}{given[number]}")
    print(f"\nExactly right, of {options.prompts} held-out prompts of each skill, %\n\n| | {' | '.join(scores)} |")
    print(f"|---|{'---:|' * len(scores)}")
    for number, skill in enumerate(SKILLS):
        print(f"| {skill} | {' | '.join(f'{found[number]:.0f}' for found in scores.values())} |")
    print(f"| **average** | {' | '.join(f'**{sum(found) / len(found):.0f}**' for found in scores.values())} |")


if __name__ == "__main__":
    main()
