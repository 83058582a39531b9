"""The results of benchmarks in the Hub's own format, from which it fills the benchmarks' leaderboards."""

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.folder.results import MERGED

PATH = ".eval_results/neuromerge.yaml"
"""The file's path in the repository. The Hub reads all YAML files of that folder."""


def benchmark_results(report: MergeReport) -> str | None:
    """The merged model's results that name a benchmark, as YAML; None if there are none.

    A result names a benchmark by its `dataset` and its `benchmark_task`.
    """
    entries = [
        EvalResultEntry(dataset_id=result.dataset, task_id=result.benchmark_task, value=result.value)
        for result in report.results
        if result.model == MERGED and result.dataset and result.benchmark_task and not report.changed
    ]
    text: str | None = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
    return text
