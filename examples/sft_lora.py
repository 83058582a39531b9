"""Trains LoRA adapters of a language model with TRL's SFTTrainer, and merges them when the last one is trained.

    pip install trl
    python examples/sft_lora.py

The language model is tiny and made here, so that the example runs anywhere. Replace it with the id of a real model.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from neuromerge_hf import AutoMergedModel, NeuroMergeCallback

TASKS = {
    "counting": ["one two three four five six", "two three four five six seven"],
    "weekdays": ["monday tuesday wednesday thursday friday", "tuesday wednesday thursday friday saturday"],
}


def make_base(folder: Path) -> PreTrainedTokenizerFast:
    """Save a language model with random weights, and return its tokenizer."""
    words = sorted({word for texts in TASKS.values() for text in texts for word in text.split()})
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *words])}, unk_token="<end>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sft"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    set_seed(0)
    base = options.output / "base"
    tokenizer = make_base(base)
    callback = NeuroMergeCallback([options.output / "counting"])  # the adapters name the base
    for task, callbacks in {"counting": [], "weekdays": [callback]}.items():
        texts = Dataset.from_dict({"text": TASKS[task] * 16})
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            SFTConfig(
                str(options.output / task),
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=2e-2,
                bf16=False,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=texts,
            eval_dataset=texts.select(range(2)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
            callbacks=callbacks,
        )
        trainer.train()
        trainer.save_model()

    model = AutoMergedModel.from_pretrained(callback.merged_dir)
    for start in ("two three", "tuesday wednesday"):
        text = model.generate(**tokenizer(start, return_tensors="pt", return_token_type_ids=False), max_new_tokens=3)
        print(tokenizer.decode(text[0]))


if __name__ == "__main__":
    main()
