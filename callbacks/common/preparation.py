"""Checks of a merge before training starts, so that a wrong expert stops a run at once."""

from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from neuromerge_hf.api import plan_spec
from neuromerge_hf.callbacks.common.lineage import shared_base, warn_of_foreign
from neuromerge_hf.callbacks.common.merging import Merging
from neuromerge_hf.callbacks.common.places import Places
from neuromerge_hf.callbacks.common.settings import TRAINED
from neuromerge_hf.callbacks.common.trained_model import adapter_config, check_related, expert_folder, save_outline
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.directory import work_folder
from neuromerge_hf.planning.resolve import resolve
from neuromerge_hf.storage.location import Location


def prepare(merging: Merging, training: Training, places: Places) -> Merging:
    """Check a merge before training starts, without the weights that training will give.

    Args:
        merging: the merge, with a base.
        training: the training that starts.
        places: where the models will be.

    Returns:
        The merge with its base and its experts at their current commits, because branches may move during training.

    Raises:
        MergeError: with all the problems that were found.
    """
    runtime = merging.runtime
    if runtime.device is not None:  # see `check_settings`
        find_device(runtime.device)
    is_adapter = adapter_config(training.model) is not None
    outlined = not (training.sharded and is_adapter)  # no process could save a sharded adapter alone
    experts = list(merging.models)
    with work_folder(Path(gettempdir())) as temporary:
        outline = temporary / TRAINED
        outline.mkdir()
        if outlined:
            save_outline(training.model, training.tokenizer, outline)
            experts.insert(0, str(expert_folder(training.model, outline)))
        if not experts:
            return merging
        try:
            if outlined and merging.settings.window:
                averaged = places.merged if merging.averages_alone else places.averaged
                plan = plan_spec(merging.average_of([Path(experts[0])]), averaged, merging.runtime_for(averaged))
            if not merging.averages_alone:
                if outlined and merging.spec.base_model is None:
                    resolved = resolve(merging.spec_of(experts), runtime.access)
                    base = shared_base(resolved, merging.base, is_adapter=is_adapter)
                    merging = replace(merging, base=base)
                plan = plan_spec(merging.spec_of(experts), places.merged, merging.runtime_for(places.merged))
                if outlined:
                    warn_of_foreign(plan)
            if not training.sharded:
                check_related(training.model, plan)
        except MergeError as error:
            named = [problem.replace(str(outline), "the model in training") for problem in error.problems]
            raise MergeError(named) from error
    others = plan.experts[len(plan.experts) - len(merging.models) :]
    models = [_at_commit(expert.location, model) for expert, model in zip(others, merging.models, strict=True)]
    return replace(merging, base=_at_commit(plan.base.location, merging.base), models=tuple(models))


def _at_commit(location: Location, given: str) -> str:
    return f"{location.id}@{location.commit}" if location.commit else given
