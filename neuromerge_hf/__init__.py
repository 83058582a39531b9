"""neuromerge_hf: merge fine-tuned transformers models and PEFT adapters into one model, by NeuroMerging.

* `AutoMergedModel.from_pretrained([...])` merges and loads.
* `merge([...], output_dir)` merges into a directory; `merge_recipe` reproduces a directory from its recipe.
* `plan_merge([...])` checks everything and says what a merge needs, from metadata alone.
* `NeuroMergeCallback` merges when a Trainer ends; `neuromerge_hf.callbacks.lightning` has one for Lightning.
* `NeuroMergingConfig` holds the hyper-parameters, `MergeReport` says what was done, `MergeError` what is wrong.
* `tune_lambdas([...], evaluate)` chooses the lambdas on validation data; `compare_methods` compares methods on it.
* `add_results(folder, [...])` adds measurements to the report and the card of a merge.
* `AverageConfig`, `TaskArithmeticConfig`, `TIESConfig`, `DARETIESConfig`, `PCBConfig`, `IsoCConfig`, `TSVConfig`,
  `NeuroIsoConfig` select another merging method.

These names and `neuromerge_hf.callbacks.lightning.NeuroMergeCallback` are the public interface. Every other module,
class and function may change without notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neuromerge_hf.version import __version__ as __version__

if TYPE_CHECKING:  # type checkers do not run `__getattr__`; a test compares this list with `PUBLIC`
    from neuromerge_hf.api import add_results as add_results
    from neuromerge_hf.api import merge as merge
    from neuromerge_hf.api import merge_recipe as merge_recipe
    from neuromerge_hf.api import plan_merge as plan_merge
    from neuromerge_hf.callbacks.transformers import NeuroMergeCallback as NeuroMergeCallback
    from neuromerge_hf.errors import MergeError as MergeError
    from neuromerge_hf.folder.report import MergeReport as MergeReport
    from neuromerge_hf.inspection import Inspection as Inspection
    from neuromerge_hf.inspection import inspect_models as inspect_models
    from neuromerge_hf.loading.auto import AutoMergedModel as AutoMergedModel
    from neuromerge_hf.methods.average import AverageConfig as AverageConfig
    from neuromerge_hf.methods.dare import DARETIESConfig as DARETIESConfig
    from neuromerge_hf.methods.iso_c import IsoCConfig as IsoCConfig
    from neuromerge_hf.methods.neuro_iso import NeuroIsoConfig as NeuroIsoConfig
    from neuromerge_hf.methods.neuromerging import NeuroMergingConfig as NeuroMergingConfig
    from neuromerge_hf.methods.pcb import PCBConfig as PCBConfig
    from neuromerge_hf.methods.task_arithmetic import TaskArithmeticConfig as TaskArithmeticConfig
    from neuromerge_hf.methods.ties import TIESConfig as TIESConfig
    from neuromerge_hf.methods.tsv import TSVConfig as TSVConfig
    from neuromerge_hf.planning.plan import MergePlan as MergePlan
    from neuromerge_hf.tuning.compare import compare_methods as compare_methods
    from neuromerge_hf.tuning.comparison import Comparison as Comparison
    from neuromerge_hf.tuning.search import TuningGrid as TuningGrid
    from neuromerge_hf.tuning.tune import Tuning as Tuning
    from neuromerge_hf.tuning.tune import tune_lambdas as tune_lambdas

# Importing torch and transformers takes seconds; `import neuromerge_hf` and `neuromerge --help` need neither.
PUBLIC = {
    "AutoMergedModel": "loading.auto",
    "AverageConfig": "methods.average",
    "Comparison": "tuning.comparison",
    "DARETIESConfig": "methods.dare",
    "Inspection": "inspection",
    "IsoCConfig": "methods.iso_c",
    "MergeError": "errors",
    "MergePlan": "planning.plan",
    "MergeReport": "folder.report",
    "NeuroMergeCallback": "callbacks.transformers",
    "NeuroIsoConfig": "methods.neuro_iso",
    "NeuroMergingConfig": "methods.neuromerging",
    "PCBConfig": "methods.pcb",
    "TIESConfig": "methods.ties",
    "TSVConfig": "methods.tsv",
    "TaskArithmeticConfig": "methods.task_arithmetic",
    "Tuning": "tuning.tune",
    "TuningGrid": "tuning.search",
    "add_results": "api",
    "compare_methods": "tuning.compare",
    "inspect_models": "inspection",
    "merge": "api",
    "merge_recipe": "api",
    "plan_merge": "api",
    "tune_lambdas": "tuning.tune",
}
"""The module of each public name."""

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
