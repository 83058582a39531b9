"""neuromerge_hf: merge fine-tuned transformers models and PEFT adapters into one, by NeuroMerging.

* `AutoMergedModel.from_pretrained([...])` merges and loads.
* `merge([...], output_dir)` merges into a directory; `merge_recipe` makes a directory again from its recipe.
* `plan_merge([...])` checks everything and says what a merge needs, without downloading a weight.
* `NeuroMergeCallback` merges when a Trainer ends; `neuromerge_hf.callbacks.lightning` has one for Lightning.
* `NeuroMergingConfig` holds the hyper-parameters, `MergeReport` says what was done, `MergeError` what is wrong.
* `tune_lambdas([...], evaluate)` chooses the lambdas on validation data; `compare_methods` compares methods on it.
* `AverageConfig`, `TaskArithmeticConfig`, `TIESConfig`, `DARETIESConfig`, `PCBConfig` choose another method of merging.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neuromerge_hf.version import __version__ as __version__

if TYPE_CHECKING:
    from neuromerge_hf.api import merge, merge_recipe
    from neuromerge_hf.callbacks.transformers import NeuroMergeCallback
    from neuromerge_hf.config import (
        AverageConfig,
        DARETIESConfig,
        NeuroMergingConfig,
        PCBConfig,
        TaskArithmeticConfig,
        TIESConfig,
    )
    from neuromerge_hf.errors import MergeError
    from neuromerge_hf.folder.report import MergeReport
    from neuromerge_hf.loading.auto import AutoMergedModel
    from neuromerge_hf.planning.plan import MergePlan
    from neuromerge_hf.planning.planner import plan_merge
    from neuromerge_hf.tuning.compare import compare_methods
    from neuromerge_hf.tuning.comparison import Comparison
    from neuromerge_hf.tuning.search import TuningGrid
    from neuromerge_hf.tuning.tune import Tuning, tune_lambdas

__all__ = [
    "AutoMergedModel",
    "AverageConfig",
    "Comparison",
    "DARETIESConfig",
    "MergeError",
    "MergePlan",
    "MergeReport",
    "NeuroMergeCallback",
    "NeuroMergingConfig",
    "PCBConfig",
    "TIESConfig",
    "TaskArithmeticConfig",
    "Tuning",
    "TuningGrid",
    "compare_methods",
    "merge",
    "merge_recipe",
    "plan_merge",
    "tune_lambdas",
]

# Importing torch and transformers takes seconds; `import neuromerge_hf` and `neuromerge --help` need neither.
_MODULES = {
    "AutoMergedModel": "loading.auto",
    "AverageConfig": "config",
    "Comparison": "tuning.comparison",
    "DARETIESConfig": "config",
    "MergeError": "errors",
    "MergePlan": "planning.plan",
    "MergeReport": "folder.report",
    "NeuroMergeCallback": "callbacks.transformers",
    "NeuroMergingConfig": "config",
    "PCBConfig": "config",
    "TIESConfig": "config",
    "TaskArithmeticConfig": "config",
    "Tuning": "tuning.tune",
    "TuningGrid": "tuning.search",
    "compare_methods": "tuning.compare",
    "merge": "api",
    "merge_recipe": "api",
    "plan_merge": "planning.planner",
    "tune_lambdas": "tuning.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
