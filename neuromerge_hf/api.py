"""The main functions of the library: `merge`, `merge_recipe`, `plan_merge` and `add_results`."""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from neuromerge_hf.folder.assets import check_own_files
from neuromerge_hf.folder.inputs import InputHasher
from neuromerge_hf.folder.recipe import Recipe, load_merge
from neuromerge_hf.folder.report import MergeReport, load_report
from neuromerge_hf.folder.results import Result
from neuromerge_hf.options import check_names, pick, with_options
from neuromerge_hf.planning.preflight import check_settings
from neuromerge_hf.planning.resolve import Resolved, resolve
from neuromerge_hf.spec import RUNTIME_NAMES, MergeOptions, MergeSpec, Models, Runtime, RuntimeOptions, read_options
from neuromerge_hf.storage.paths import user_path

TURN_ON = "On a CPU, `pip install neuromerge-hf[fast]` brings numba."
TURN_OFF = "NUMBA_DISABLE_JIT=1 in the environment turns numba off."

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from neuromerge_hf.planning.plan import MergePlan


@with_options(MergeSpec, Runtime)
def merge(models: Models, output_dir: str | os.PathLike[str], **options: "Unpack[MergeOptions]") -> MergeReport:
    """Merge fine-tunes of one base model, by NeuroMerging (Fang et al., arXiv:2503.05320) or the method of `config`.

    Args:
        models: the experts: full checkpoints and PEFT adapters, mixed freely. Each is a folder or an id on the Hub.
            An id may include a subfolder and end in ``@revision``.
        output_dir: the directory for the merged model: weights, configuration, tokenizer, the experts' heads, the
            recipe that reproduces it, the report and the model card. It appears once it is complete. With `overwrite`
            it may hold an earlier merge, whose card's hand-written text is kept, but no other files.
        **options: the fields of `MergeSpec` and `Runtime`.

    Returns:
        The report on the merge, which is also written to ``merge_report.json`` in the directory.

    Raises:
        MergeError: if the models cannot be merged. It lists all problems that were found. No files are left behind.

    Examples:
        >>> report = merge(["math", "code-lora"], "merged", base_model="base")
        >>> [expert.name for expert in report.experts]
        ['math', 'code-lora']
    """
    spec, runtime = read_options("merge", models, options)
    return merge_spec(spec, output_dir, runtime)


@with_options(Runtime)
def merge_recipe(
    path: str | os.PathLike[str], output_dir: str | os.PathLike[str], **options: "Unpack[RuntimeOptions]"
) -> MergeReport:
    """Reproduce a merged model, byte for byte, from the recipe that its merge wrote; or merge what a file describes.

    Args:
        path: the ``recipe.yaml``; or a YAML file by hand, with the fields of `MergeSpec` and ``method``; or one of
            mergekit (linear, task_arithmetic, ties, dare_ties).
        output_dir: the directory for the merged model.
        **options: the fields of `Runtime`.

    Returns:
        The report on the merge.

    Raises:
        MergeError: if an input has changed since the recipe was written.

    Examples:
        >>> merge(["math"], "first", base_model="base").method
        'neuro_iso'
        >>> merge_recipe("first/recipe.yaml", "again").method
        'neuro_iso'
    """
    check_names("merge_recipe", options, RUNTIME_NAMES)
    recipe = load_merge(user_path(path, "path"))
    if isinstance(recipe, MergeSpec):
        return merge_spec(recipe, output_dir, pick(Runtime, options))
    recipe.check_files()
    report = merge_spec(recipe.spec, output_dir, pick(Runtime, options), recipe=recipe)
    if report.environment["kernel"] != recipe.kernel:
        logger.warning(
            "The recipe's merge was computed by %s, and this one by %s: their last bits may differ. %s",
            recipe.kernel,
            report.environment["kernel"],
            TURN_ON if recipe.kernel == "numba" else TURN_OFF,
        )
    return report


@with_options(MergeSpec, Runtime)
def plan_merge(
    models: Models,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    **options: "Unpack[MergeOptions]",
) -> "MergePlan":
    """Find and check everything that a merge needs, from metadata alone.

    From the Hub, only small files (configurations, tokenizers, indexes) and the headers of safetensors files are
    downloaded. ``.bin`` files have no header. If a model has no other weights, they are downloaded, unless a problem
    has been found before. Problems with values (a NaN, copies of a tied parameter that differ) are found by the merge.

    Args:
        models: the experts, as in `merge`.
        output_dir: a directory for the merged model, to check that it can be written.
        **options: the fields of `MergeSpec` and `Runtime`.

    Returns:
        The plan: what the merge will do and need. `str` summarises it in a few lines.

    Raises:
        MergeError: if the models cannot be merged. It lists all problems that were found, each with what to do.

    Examples:
        >>> plan = plan_merge(["math", "code-lora"], base_model="base")
        >>> plan.bytes_to_download
        0
    """
    spec, runtime = read_options("plan_merge", models, options)
    return plan_spec(spec, output_dir, runtime)


@with_options(Runtime)
def plan_recipe(
    path: str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    **options: "Unpack[RuntimeOptions]",
) -> "MergePlan":
    """Plan the merge of a recipe; see `plan_merge`.

    Args:
        path: the YAML file, as in `merge_recipe`.
        output_dir: a directory for the merged model, to check that it can be written.
        **options: the fields of `Runtime`.
    """
    check_names("plan_recipe", options, RUNTIME_NAMES)
    found = load_merge(user_path(path, "path"))
    return plan_spec(found if isinstance(found, MergeSpec) else found.spec, output_dir, pick(Runtime, options))


def add_results(folder: str | os.PathLike[str], results: Iterable[Result | Mapping[str, Any]]) -> MergeReport:
    """Add measurements to the report and the card of a merged model. They replace older measurements of the same kind.

    Args:
        folder: the directory that `merge` wrote.
        results: dictionaries with model, task, metric and value, and optionally the other fields of `Result`. The
            model is "merged", "base" or the name of an expert.

    Returns:
        The report with the measurements.

    Raises:
        MergeError: if an entry is incomplete, its value is not finite, or its model is not part of the merge.

    Examples:
        >>> folder = merge(["math"], "measured", base_model="base").output_dir
        >>> report = add_results(folder, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.9}])
        >>> report.results[0].value
        0.9
    """
    from neuromerge_hf.model_cards import write_card

    path = user_path(folder, "folder")
    check_own_files(path)
    report = load_report(path).with_results(results)
    report.save(report.output_dir)
    write_card(report.output_dir)
    return report


def merge_spec(
    spec: MergeSpec,
    output_dir: str | os.PathLike[str],
    runtime: Runtime,
    resolved: Resolved | None = None,
    recipe: Recipe | None = None,
) -> MergeReport:
    """Merge what a spec describes; see `merge`.

    Args:
        resolved: the models, if they are resolved already.
        recipe: the recipe that gives the spec. The bytes that are merged must have its hashes.
    """
    target = user_path(output_dir, "output_dir").absolute()
    problems = check_settings(spec, runtime, target, resolved.problems if resolved else None)
    resolved = resolved or resolve(spec, runtime.access, problems)
    with InputHasher(resolved.base, [expert.location for expert in resolved.experts], recipe) as inputs:
        # Imported here, because loading transformers takes seconds, in which the inputs are hashed.
        from neuromerge_hf.assembly.assemble import assemble
        from neuromerge_hf.planning.planner import plan_with_weights

        return assemble(plan_with_weights(spec, runtime, resolved, target), target, runtime, inputs)


def plan_spec(spec: MergeSpec, output_dir: str | os.PathLike[str] | None, runtime: Runtime) -> "MergePlan":
    """Plan the merge that a spec describes; see `plan_merge`."""
    from neuromerge_hf.planning.planner import make_plan  # loads transformers, which takes seconds

    target = None if output_dir is None else user_path(output_dir, "output_dir").absolute()
    problems = check_settings(spec, runtime, target)
    return make_plan(spec, runtime, resolve(spec, runtime.access, problems), target)
