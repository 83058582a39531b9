"""Trains the experts: LoRA adapters and full fine-tunes of the base, one per skill and seed."""

import random
import shutil
import time
from pathlib import Path

import torch
from model import answer_logits, collate, encode, load_tokenizer, save_base
from peft import LoraConfig, PeftModel, get_peft_model
from skills import Skill
from transformers import LlamaForCausalLM, set_seed

BATCH_SIZE = 8
RANK = 8
RATES = {"lora": 1e-3, "full": 5e-5}
STEPS = {"dates": 100, "reviews": 150, "numbers": 120, "records": 60}
FAMILIES = (("lora", 0), ("full", 0), ("lora", 1))
"""The kinds and the seeds of the experts, in the order of the work."""


def expert_folder(cache: Path, kind: str, seed: int, skill: str) -> Path:
    return cache / "experts" / f"{kind}-{seed}" / skill


def train_expert(skill: Skill, kind: str, seed: int, cache: Path) -> Path:
    """Train an expert, unless it is there, and return its folder, which appears once it is complete.

    The loss is on the answers alone. The optimiser is AdamW with 10% warm-up and linear decay, on float32 weights under
    bfloat16 autocast.
    """
    folder = expert_folder(cache, kind, seed, skill.name)
    if folder.is_dir():
        return folder
    started = time.perf_counter()
    set_seed(seed)
    tokenizer = load_tokenizer(cache)
    model: LlamaForCausalLM | PeftModel = LlamaForCausalLM.from_pretrained(save_base(cache), dtype=torch.float32)
    llama = model
    if kind == "lora":
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        llama = model.base_model.model
    model.train()
    encoded = encode(tokenizer, skill.train)
    order, steps = random.Random(seed), STEPS[skill.name]
    warmup = max(1, steps // 10)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[kind], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    for _step in range(steps):
        batch = collate(order.sample(encoded, BATCH_SIZE), [], tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, _ = answer_logits(llama, batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"{kind}-{seed}/{skill.name}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return folder
