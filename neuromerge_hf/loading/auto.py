"""`AutoMergedModel` merges experts, or finds their finished merge, and loads it as a plain transformers model."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from neuromerge_hf.access import PUBLIC
from neuromerge_hf.api import merge_spec
from neuromerge_hf.config import MergeConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.inputs import identity_of
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.loading.arguments import check_arguments, check_spelling, unknown_arguments
from neuromerge_hf.loading.classes import class_of_files
from neuromerge_hf.loading.heads import folder_with_head
from neuromerge_hf.loading.loaded_merge import LoadedMerge, settings_of
from neuromerge_hf.loading.merged_model import merged_class
from neuromerge_hf.options import pick, with_options
from neuromerge_hf.planning.planner import make_plan
from neuromerge_hf.planning.resolve import load_config, resolve
from neuromerge_hf.skeleton import model_class_of
from neuromerge_hf.spec import OPTION_NAMES, MergeSpec, ModelId, Models, Runtime, read_options
from neuromerge_hf.storage.files import HEADS
from neuromerge_hf.storage.finite import is_finite, name_of
from neuromerge_hf.storage.location import Location, locate
from neuromerge_hf.storage.paths import user_cache, user_path
from neuromerge_hf.storage.temporary import remove_leftovers

NOT_FOR_LOADING = ("dtype", "max_shard_size", "tuned_on", "overwrite")
"""Merge options that loading does not take. Its `dtype` is transformers' own: the dtype of the loaded model."""

SHARED = ("token", "trust_remote_code", "local_files_only", "force_download", "cache_dir")
"""The merge options that transformers' `from_pretrained` takes as well."""

MERGE_ONLY = tuple(name for name in OPTION_NAMES if name not in (*NOT_FOR_LOADING, *SHARED))
"""The merge options that transformers' `from_pretrained` does not take."""

OURS = (*MERGE_ONLY, "auto_class", "head", "merge_cache_dir")
"""The arguments of `AutoMergedModel.from_pretrained` that are not transformers' own."""


class AutoMergedModel:
    """Merges experts into their base and loads the result as the transformers class of its architecture."""

    def __init__(self) -> None:
        raise TypeError("AutoMergedModel is made with AutoMergedModel.from_pretrained([...]).")

    @classmethod
    @with_options(MergeSpec, Runtime, without=NOT_FOR_LOADING, takes_others=True)
    def from_pretrained(
        cls,
        models: Models | ModelId,
        *,
        auto_class: Any = None,
        head: str | None = None,
        merge_cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Any:
        """Merge the experts, or find their finished merge in the cache, and load it.

        Args:
            models: the experts, as in `neuromerge_hf.merge`; or the folder or id of one model that is already merged.
            auto_class: the Auto class or model class of transformers to load the merged model with. The default is the
                experts' class, or the base's class if the experts' classes differ or have heads of their own.
            head: the name of an expert (see `MergeReport.experts`) whose task head is put on the merged backbone. The
                model is then loaded as that expert's task model.
            merge_cache_dir: the folder that keeps finished merges. The default is ``neuromerge`` in the Hub's home
                folder. ``neuromerge cache`` lists and deletes them.
            **options: any other argument of transformers' `from_pretrained`, such as ``device_map``, ``max_memory`` or
                ``quantization_config``. ``dtype`` is the dtype of the loaded model.

        Returns:
            A plain transformers model in evaluation mode: an instance of a class that only the files tell, so that type
            checkers let it do what any model does (``generate``). Its `save_pretrained` and `push_to_hub` add
            tokenizer, recipe, report, heads and model card (see `merged_model.MergedModelMixin`).

        Raises:
            MergeError: if the models cannot be merged, `head` names no expert with a head, or a weight is too large
                for ``dtype``.
            TypeError: if an option of a merge is given with one model that is merged already, or one that concerns the
                merged folder alone with several.

        Examples:
            >>> model = AutoMergedModel.from_pretrained(["math", "code-lora"], base_model="base", merge_cache_dir="tmp")
            >>> type(model).__name__
            'LlamaForCausalLM'
        """
        _check_dtype(options.get("dtype"))
        cache = user_path(merge_cache_dir or user_cache(), "merge_cache_dir").absolute()
        if isinstance(models, str | os.PathLike):
            _check_options_of_one(models, options)
            merging: dict[str, Any] = {}
        else:
            _check_options_of_several(options)
            merging = {name: options.pop(name) for name in MERGE_ONLY if name in options}
        shared: dict[str, Any] = {name: options[name] for name in SHARED if name in options}
        merging |= shared
        runtime = pick(Runtime, shared)
        for name in ("force_download", "cache_dir"):  # what transformers then loads is a folder on this machine
            options.pop(name, None)
        revision = options.pop("revision", None)
        if isinstance(models, str | os.PathLike):
            location = locate(models, revision=revision, access=runtime.access)
            if not (location.folder / RECIPE_NAME).is_file():
                raise MergeError(f"{location} is not a merged model. Give the experts as a list.")
            _check_arguments(options, location, auto_class, runtime.trust_remote_code)
            location.fetch_weights()
            if head and location.commit:
                heads = [f"{HEADS}/*/config.json", f"{HEADS}/{head}/*"]
                location.download(heads, ignore=None)
        elif revision is not None:
            raise MergeError(f"Each model has its own revision: write it as id@{revision}, and leave revision= out.")
        else:
            merged = _find_or_merge(models, merging, cache, auto_class, options)
            location = Location(str(merged), merged)
        folder = location.folder
        if head is not None:
            folder = folder_with_head(folder, folder / HEADS, head, cache)
        model_class: Any = class_of_files(folder, auto_class, trust_remote_code=runtime.trust_remote_code)
        loaded = merged_class(model_class).from_pretrained(folder, **options)
        model = loaded[0] if options.get("output_loading_info") else loaded
        if options.get("dtype", options.get("torch_dtype")) not in (None, "auto"):
            _check_held(model)
        if location.commit and location.id == location.repo and head is None:
            # PEFT writes this name into adapters as their base. Otherwise it would be a path in the local cache.
            model.name_or_path = location.id
        merged_from = replace(location, folder=location.folder.absolute(), access=PUBLIC)
        model._origin = LoadedMerge(merged_from, cache, head, settings_of(model))
        return loaded


def _check_held(model: PreTrainedModel) -> None:
    """Raise a `MergeError` if a parameter is not finite in the dtype to which transformers cast it."""
    for name, parameter in model.named_parameters():
        if type(parameter) is Parameter and not parameter.is_meta and not is_finite(parameter.detach()):
            raise MergeError(
                f"{name} of the merged model is not finite in {name_of(parameter.dtype)}: its values are too large "
                'for that, or not finite in the files. Leave dtype= out, or pass "bfloat16" or "float32".'
            )


def _check_dtype(dtype: object) -> None:
    """Raise a `MergeError` if transformers will not take this dtype once everything is merged."""
    is_name = isinstance(dtype, str) and (dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype))
    if not is_name and not isinstance(dtype, torch.dtype | dict | None):
        raise MergeError(f'dtype must be a dtype of torch, its name, or "auto", not {dtype!r:.200}.')


def _check_options_of_one(model: ModelId, options: dict[str, Any]) -> None:
    """Raise a `TypeError` if options of a merge are given with one model. Those that are None are taken out."""
    for name in (*MERGE_ONLY, *NOT_FOR_LOADING):
        # A dtype, and a config of another kind, are transformers' own.
        if name == "dtype" or (name == "config" and not isinstance(options.get(name), MergeConfig | None)):
            continue
        if options.pop(name, None) is not None:
            raise TypeError(
                f"{name}= is an option of a merge, but {os.fspath(model)} is one model, which must be merged already. "
                f"Leave {name}= out, or give the experts as a list."
            )


def _check_options_of_several(options: Collection[str]) -> None:
    for name in NOT_FOR_LOADING:
        if name in options and name != "dtype":
            raise TypeError(
                f"AutoMergedModel.from_pretrained has no argument {name!r}: it is one of `merge`, which writes a "
                "folder of your own. Merge first, and then give that folder."
            )


def _check_arguments(
    arguments: Mapping[str, Any], location: Location, auto_class: Any, trust_remote_code: bool
) -> None:
    """Check the arguments for loading a model like the one at a location, whose class stands for an Auto class."""
    if not unknown_arguments(arguments):
        return
    config = load_config(location, trust_remote_code)
    is_class = isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel)
    model_class = auto_class if is_class else model_class_of(config, location.folder, trust_remote_code)
    check_arguments(arguments, config, model_class, OURS)


def _find_or_merge(
    models: Models, options: Mapping[str, Any], cache: Path, auto_class: Any, loading: Mapping[str, Any]
) -> Path:
    spec, runtime = read_options("AutoMergedModel.from_pretrained", models, options)
    try:
        resolved = resolve(spec, runtime.access)
    except MergeError:
        check_spelling(loading, OURS)
        raise
    if resolved.problems:
        check_spelling(loading, OURS)
        make_plan(spec, runtime, resolved)  # raises these problems together with the plan's own
    _check_arguments(loading, resolved.base, auto_class, runtime.trust_remote_code)
    experts = [identity_of(expert.location) for expert in resolved.experts]
    folder = cache / spec.fingerprint([identity_of(resolved.base, is_base=True), *experts])
    remove_leftovers(cache)  # a merge that is there is not made again, which would remove them
    if not folder.is_dir():
        try:
            merge_spec(spec, folder, runtime, resolved)
        except (MergeError, OSError):
            if not folder.is_dir():  # otherwise another process has finished the same merge
                raise
    return folder
