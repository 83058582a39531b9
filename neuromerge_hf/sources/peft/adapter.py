"""Opening PEFT adapters as experts: the roles of their tensors, and their task vectors."""

import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from neuromerge_hf.errors import MergeError, abridged
from neuromerge_hf.skeleton import ParameterRef, skeleton_of
from neuromerge_hf.sources import lora
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.checks import is_mergeable, mismatch, missing_parameter, same_values
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.heads import Head, task_class, task_config
from neuromerge_hf.sources.peft import effective, tuner
from neuromerge_hf.sources.task_vector import Difference, TaskVector
from neuromerge_hf.storage.files import ADAPTER_FILES
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor
from neuromerge_hf.text import listed

WRAPPERS = (".base_layer.", ".modules_to_save.", ".token_adapter.")
"""PEFT's wrapper modules in the names of biases (bias="all") and of adapted embeddings."""

TOKENS = "trainable_tokens_delta"
"""The end of the name of a tensor with the rows that trainable tokens replace in an embedding."""


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter by their roles. Names lack the prefix "base_model.model.".

    Attributes:
        file: the adapter's weight file.
        tuned: the tuner's tensors by name, for each module that it changes.
        tokens: the new rows of each embedding of which only some tokens were trained.
        stored: the parameters that are stored whole, by name.
        ignored: the modules of the tensors that PEFT ignores, because target_modules does not name them, or because
            it wraps a module that they would fill.
    """

    file: Path
    tuned: dict[str, dict[str, StoredTensor]] = field(default_factory=lambda: defaultdict(dict))
    tokens: dict[str, StoredTensor] = field(default_factory=dict)
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def read_adapter(location: Location, config: tuner.AnyConfig, base: Base) -> AdapterTensors:
    """Open the tensors of an adapter, from their headers alone.

    Raises:
        MergeError: if a file is missing or damaged, or nothing in it is of a module that target_modules names.
    """
    main = location.find_weights()
    if main is None:
        raise MergeError(f"{location} has no weights: it holds none of {', '.join(ADAPTER_FILES)}.")
    adapter = AdapterTensors(main)
    bare: list[str] = []
    prefix = f".{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}"
    for key, tensor in location.open_weights(main).items():
        name = key.removeprefix("base_model.model.")
        if ".original_module." in name:  # bias="all" also stores modules that modules_to_save replaced
            continue
        if name.startswith("base_model."):  # state that the tuner's layers share
            continue
        role: dict[str, StoredTensor]
        if name.endswith(f".{TOKENS}"):
            role, name = adapter.tokens, name.removesuffix(f".{TOKENS}").removesuffix(".token_adapter")
        elif prefix in name:
            role = adapter.tuned[name.partition(prefix)[0].replace(".base_layer", "")]
        else:
            role = adapter.stored
            if name.endswith((".weight", ".bias")) and not any(wrapper in name for wrapper in WRAPPERS):
                bare.append(name)
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, ".")
        if name in role and not same_values(role[name], tensor):  # bias="all" repeats those of modules_to_save
            raise MergeError(
                f"{main} holds two tensors for {name} that differ, one of them as {key}. Save the adapter again."
            )
        role[name] = tensor
    if tuner.type_of(config) == "TRAINABLE_TOKENS":  # it also stores the rows of tied embeddings
        for name in list(adapter.tokens):
            if base.ties.get(f"{name}.weight", "").removesuffix(".weight") in adapter.tokens:
                del adapter.tokens[name]
    try:
        untargeted = [module for module in adapter.tuned if not tuner.is_targeted(config, module, base)]
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise MergeError(
            f"target_modules, or an option beside it, in {location.folder / 'adapter_config.json'} is not valid "
            f"({error}). Save the adapter again."
        ) from error
    if untargeted and len(untargeted) == len(adapter.tuned):
        raise MergeError(
            f"{main} holds tensors of {listed(untargeted)}, but target_modules in its adapter_config.json names none "
            "of these modules. Save the adapter again with its own configuration."
        )
    for module in untargeted:
        del adapter.tuned[module]
    wrapped = [name for name in bare if name.rpartition(".")[0] in adapter.tuned and not _is_saved_module(name, config)]
    for name in wrapped:  # PEFT has this parameter under the name of its wrapper
        del adapter.stored[name]
    adapter.ignored.extend([*untargeted, *wrapped])
    return adapter


def changes_one_tied_embedding(location: Location, config: tuner.AnyConfig, base: Base) -> bool:
    """Whether an adapter changes only one of two tied embeddings."""
    with suppress(MergeError):  # open_adapter reports it
        adapter = read_adapter(location, config, base)
        saved = [name for name in adapter.stored if _is_saved_module(name, config)]
        tokens = [f"{module}.weight" for module in adapter.tokens]
        if len(tokens) == 1 and tokens[0] not in base.ties:  # PEFT changes the tied embedding too
            tokens = []
        names = [*saved, *tokens, *(f"{module}.weight" for module in adapter.tuned)]
        return any(ref and base.is_tied(ref) for ref in base.skeleton.refs(names).values())
    return False


def _is_saved_module(parameter: str, config: tuner.AnyConfig) -> bool:
    """Whether a stored parameter belongs to modules_to_save. Otherwise it can be PEFT's copy of the embeddings."""
    module = parameter.rpartition(".")[0]
    return any(
        module == saved or module.endswith(f".{saved}") for saved in getattr(config, "modules_to_save", None) or ()
    )


def open_adapter(name: str, location: Location, config: tuner.AnyConfig, base: Base, notes: list[str]) -> Expert:
    """Open an adapter as an expert, from the headers of its files.

    Args:
        notes: remarks on the adapter for the report.

    Raises:
        MergeError: if a file is missing or damaged, or the adapter does not fit the base.
    """
    adapter = read_adapter(location, config, base)
    refs = base.skeleton.refs(adapter.stored)
    if adapter.ignored:
        notes.append(
            f"{location.public_name} holds tensors for {listed(adapter.ignored)}, which PEFT does not load by its "
            "adapter_config.json (target_modules). They were left out, as PEFT leaves them out."
        )
    problems = [
        f"{adapter.file} changes {module} in two ways, of which only one can be merged. Leave the adapter out."
        for module in adapter.tuned.keys() & adapter.tokens.keys()
    ]
    stored: dict[ParameterRef, StoredTensor] = {}
    shared: dict[ParameterRef, StoredTensor] = {}
    head: dict[str, StoredTensor] = {}
    for key, tensor in adapter.stored.items():
        ref = refs[key]
        found = base.at(ref)
        if (ref is None or found is None) and base.has_module(key.rpartition(".")[0]):
            problems.append(
                f"{adapter.file} holds {key}, which is neither a parameter of the base {base.location} nor known of an "
                f"adapter of type {tuner.type_of(config)}. Check base_model, or upgrade: pip install -U peft."
            )
        elif base.has_unplaced(key):
            problems.append(base.unplaced_message(location, key))
        elif ref is None or found is None:
            head[key] = tensor
        elif found[0].shape != tensor.shape:
            problems.append(mismatch(key, found[0], tensor, base.skeleton, ref))
        elif _is_saved_module(key, config) or not base.was_tied(ref):
            stored[ref] = tensor
        elif not same_values(tensor, shared.setdefault(base.tied_refs(ref)[0], tensor)):
            problems.append(
                f"{adapter.file} stores embeddings that its base ties as two that differ, {key} and another, and does "
                "not name them in modules_to_save. Save the adapter again."
            )
        elif not same_values(tensor, found[0]):  # save_embedding_layers also stores unchanged embeddings
            stored |= dict.fromkeys(base.tied_refs(ref), tensor)
    task_vectors: dict[ParameterRef, TaskVector] = {
        ref: Difference(tensor, found[1])
        for ref, tensor in stored.items()
        if (found := base.at(ref)) and is_mergeable(tensor)
    }

    model_class = task_class(config.task_type, base.config)
    head_config = task_config(base.config, location.folder, model_class, head) if head else None
    computed = None
    if isinstance(config, LoraConfig) and lora.is_plain(config):
        factors, found_problems = lora.open_factors(location, adapter.file, adapter.tuned, config, base, task_vectors)
        task_vectors |= factors
        problems += found_problems
        tuned: Mapping[str, dict[str, StoredTensor]] = {}
    else:
        tuned = adapter.tuned or tuner.shared_state_targets(config, base)
    if tuned or adapter.tokens:
        changes, found_problems = tuner.find_changes(location, config, tuned, adapter.tokens, base)
        problems += found_problems
        if not problems:
            computed, vectors = effective.open_computed(
                location, adapter.file, config, changes, base, stored, head_config
            )
            task_vectors |= vectors
    if problems:
        raise MergeError(abridged(problems))

    if model_class and model_class is not base.skeleton.model_class and not head:
        skeleton = skeleton_of(model_class, base.config)
        missing = missing_parameter(skeleton, skeleton.refs(base.tensors))
        if missing:
            raise MergeError(
                f"{location} was trained as {model_class.__name__} (task_type={str(config.task_type)!r}), whose "
                f"{missing} is in neither the adapter nor the base {base.location}. "
                "Check base_model: it must be the model that the adapter was trained on, with its head."
            )
    return Expert(
        name=name,
        location=location,
        kind=_kind(config, task_vectors),
        model_class_name=model_class.__name__ if model_class else None,
        task_vectors=task_vectors,
        head=Head(head_config, head) if head_config else None,
        computed=computed,
        notes=notes,
    )


def _kind(config: tuner.AnyConfig, task_vectors: Mapping[ParameterRef, TaskVector]) -> str:
    """The adapter's type in the report, with the variants and ranks of LoRA."""
    if not isinstance(config, LoraConfig) or tuner.type_of(config) != "LORA":
        return tuner.type_of(config)
    return " ".join(["LoRA", *lora.variants(config), *lora.ranks(task_vectors)])
