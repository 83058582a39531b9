"""How a user calls the library: `make lint` type-checks this file and runs nothing of it.

A comment that ignores an error stands where a mistake must be seen: mypy complains of comments that ignore nothing.
"""

from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

from neuromerge_hf import (
    AutoMergedModel,
    MergeReport,
    NeuroMergeCallback,
    NeuroMergingConfig,
    TIESConfig,
    TuningGrid,
    add_results,
    compare_methods,
    inspect_models,
    merge,
    merge_recipe,
    plan_merge,
    tune_lambdas,
)

report: MergeReport = merge(["me/math", Path("chat")], "merged", base_model="me/base", dtype=torch.bfloat16, threads=2)
merge(["me/math"], Path("merged"), config=TIESConfig(density=0.3), overwrite=True)
merge(["me/math"], "merged", densty=0.2)  # type: ignore[call-arg]
merge(["me/math"], "merged", threads="two")  # type: ignore[arg-type]
merge_recipe("recipe.yaml", "merged", device="cpu")
merge_recipe("recipe.yaml", "merged", dtype="float32")  # type: ignore[call-arg]
needed: int = plan_merge(["me/math"], output_dir="merged").bytes_to_download
add_results("merged", [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.9}]).results[0].value.hex()

merge({"sums": "me/math", "chat": Path("chat")}, "merged", config="ties")
merge({"sums": 3}, "merged")  # type: ignore[dict-item]
plan_merge(["me/math"], config={"method": "ties", "density": 0.3}).to_dict()["notes"]

AutoMergedModel.from_pretrained(["me/math"], base_model="me/base", device_map="auto", dtype="bfloat16").eval()
AutoMergedModel.from_pretrained("me/merged").generate(max_new_tokens=3)
tune_lambdas(["me/math"], lambda model: 1.0, grid=TuningGrid(rounds=2), device_map="auto").config.density.hex()
compare_methods(["me/math"], lambda model: [1.0], methods=[NeuroMergingConfig(), "ties"]).verdict.upper()

NeuroMergeCallback(["me/math"], when="save", tune=True, dtype="bfloat16")
NeuroMergeCallback(["me/math"], when="never")  # type: ignore[arg-type]
NeuroMergeCallback(["me/math"], overwrite="yes")  # type: ignore[arg-type]

live: PreTrainedModel = AutoModel.from_pretrained("me/chat")
merge([live, "me/math"], "merged", base_model=live)
merge([torch.nn.Linear(2, 2)], "merged")  # type: ignore[list-item]
inspect_models(["me/math", live], base_model="me/base", local_files_only=True).diagnostics.verdict.strip()
inspect_models("merged").save(Path("page.html")).read_text()
AutoMergedModel.from_pretrained(["me/math"], merge_cache_dir="merges", cache_dir=Path("hub")).eval()
