"""Measures merged language models: generative skills, LoRA adapters and full fine-tunes of SmolLM2-135M-Instruct."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from experts import FAMILIES, train_expert
from model import save_base
from skills import SKILLS, load_skill
from transformers.utils.logging import disable_progress_bar, set_verbosity_error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="where the base, experts and scores are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    disable_progress_bar()
    set_verbosity_error()
    save_base(options.cache)
    for kind, seed in FAMILIES:
        for skill in SKILLS:
            train_expert(load_skill(skill, options.cache / "data"), kind, seed, options.cache)


if __name__ == "__main__":
    main()
