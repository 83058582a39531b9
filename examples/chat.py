"""Merges three LoRA experts of a language model, and lets the base, each expert and the merged model answer.

make chat
python examples/chat.py --method ties --prompts 150
"""

import argparse
from pathlib import Path

import torch
from chat_model import answer, load_tokenizer, save_base, share_right
from chat_skills import SKILLS, held_out
from peft import PeftModel
from transformers import LlamaForCausalLM

from neuromerge_hf import AutoMergedModel

EXPERTS = Path(__file__).with_name("chat_experts")
GENERAL = "What is the capital of France?"


def load_models(cache: Path, method: str) -> dict[str, LlamaForCausalLM]:
    """Return the base, the experts and the merged model, by their names."""
    base = save_base(cache)
    models = {"base": LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for skill in SKILLS:
        expert = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), EXPERTS / skill)
        models[skill] = expert.merge_and_unload().eval()
    models["merged"] = AutoMergedModel.from_pretrained(
        [EXPERTS / skill for skill in SKILLS], base_model=base, config=method, merge_cache_dir=cache / "merged"
    )
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".data/chat"), help="the folder of the base")
    parser.add_argument("--method", default="neuro_iso")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts of each skill for the scores")
    options = parser.parse_args()
    models, tokenizer = load_models(options.cache, options.method), load_tokenizer(options.cache)

    prompts = [(prompt, right) for skill in SKILLS for prompt, right in held_out(skill, 2)]
    for prompt, right in [*prompts, (GENERAL, "Paris")]:
        print(f"\n{prompt}\n  {'(right)':9}{right}")
        for name, model in models.items():
            print(f"  {name:9}{answer(model, tokenizer, prompt)}")

    print(f"\nExactly right, of {options.prompts} held-out prompts of each skill, %\n\n| | {' | '.join(models)} |")
    print(f"|---|{'---:|' * len(models)}")
    scores = []
    for skill in SKILLS:
        examples = held_out(skill, options.prompts)
        scores.append([100 * share_right(model, tokenizer, examples) for model in models.values()])
        print(f"| {skill} | {' | '.join(f'{score:.0f}' for score in scores[-1])} |")
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    print(f"| **average** | {' | '.join(f'**{mean:.0f}**' for mean in means)} |")


if __name__ == "__main__":
    main()
