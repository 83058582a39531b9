"""Merges LoRA adapters with PEFT's `add_weighted_adapter` and writes the merged model. `scaling.py` times it.

python benchmarks/peft_merge.py COMBINATION BASE OUTPUT ADAPTER ...
"""

import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

DENSITY = 0.2


def main(combination: str, base: str, output: str, *adapters: str) -> None:
    names = [Path(adapter).name for adapter in adapters]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name)
    density = {} if combination == "linear" else {"density": DENSITY}
    model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=combination, **density)
    model.set_adapter("merged")
    model.merge_and_unload().save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
