"""Trains the LoRA adapters in chat_experts/, one for each skill, on a CPU in about twenty minutes.

python examples/train_chat_experts.py --output examples/chat_experts
"""

import argparse
import random
import shutil
from pathlib import Path

import torch
from chat_model import NAME, answer_logits, collate, encode, load_tokenizer, save_base, share_right
from chat_skills import HELD_OUT, SKILLS, VALIDATION, examples_of
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, set_seed

STEPS = {"dates": 150, "numbers": 150, "records": 70}
RATE, BATCH_SIZE = 3e-3, 8


def train(skill: str, cache: Path, output: Path) -> None:
    """Train the adapter of a skill, say how good it is on validation prompts, and save it in float16."""
    set_seed(0)
    base, tokenizer = save_base(cache), load_tokenizer(cache)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    llama = model.base_model.model
    first = HELD_OUT + VALIDATION
    validation, training = examples_of(skill)[HELD_OUT:first], examples_of(skill)[first:]
    encoded, order, steps = encode(tokenizer, training), random.Random(0), STEPS[skill]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps // 10), (steps - step) / (steps - steps // 10))
    )
    for _ in range(steps):
        logits, targets, _ = answer_logits(
            llama, collate(order.sample(encoded, BATCH_SIZE), [], tokenizer.pad_token_id)
        )
        cross_entropy(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{skill}: {share_right(llama.eval(), tokenizer, validation):.1%} of the validation prompts", flush=True)
    save(model, output / skill)


def save(model, folder: Path) -> None:
    """Save an adapter in float16, which names its base by its id on the Hub and has no card."""
    model.half()
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".data/chat"), help="the folder of the base")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    for skill in SKILLS:
        shutil.rmtree(options.output / skill, ignore_errors=True)
        train(skill, options.cache, options.output)


if __name__ == "__main__":
    main()
