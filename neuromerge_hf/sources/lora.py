"""Experts that are plain LoRA adapters: task vectors ``scaling * B @ A``, formed a block of rows at a time."""

import dataclasses
import math
import re
from collections import defaultdict

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from neuromerge_hf.checkpoint import ADAPTER_FILES
from neuromerge_hf.errors import MergeError, abridged
from neuromerge_hf.heads import Head, task_class, task_config
from neuromerge_hf.layout import Layout
from neuromerge_hf.location import Location
from neuromerge_hf.skeleton import Place, Skeleton
from neuromerge_hf.sources.expert import Base, Expert, is_mergeable, mismatch, missing_parameter, same_values
from neuromerge_hf.sources.task_vector import Difference, LowRank, TaskVector
from neuromerge_hf.tensors import StoredTensor, read_whole

SUPPORTED = (
    "What can be merged now: full checkpoints, and LoRA adapters (any rank, alpha, rslora, rank and alpha patterns, "
    "linear layers, Conv1D and embeddings, bias, modules_to_save). Put any other adapter that changes weights into its "
    "base with PEFT's merge_and_unload(), save that model, and give it in place of the adapter."
)

NEUTRAL_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of LoraConfig.init_lora_weights that leave the base's weights as they are."""

WRAPPER = re.compile(r"\.(base_layer|modules_to_save)\.")
"""PEFT's modules around those of the model, in the names of biases (bias="all") and of adapted embeddings."""

LOW_RANK_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")


def load_adapter_config(location: Location) -> LoraConfig:
    """A LoRA adapter's configuration.

    Raises:
        MergeError: if it is damaged, or that of an adapter that cannot be merged: found without its weights.
    """
    path = location.folder / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(location.folder))
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{path} is not an adapter configuration that this PEFT understands: {error}") from error
    reasons = _reasons_against(config)
    if reasons:
        raise MergeError([f"{location} {reason}" for reason in reasons])
    return config


def _reasons_against(config: PeftConfig) -> list[str]:
    """Why an adapter cannot be merged, without its subject."""
    kind = f"is an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}"
    if config.is_prompt_learning or config.is_adaption_prompt:
        return [
            f"{kind}: it adds to what the model reads and is no change of the base's weights, so that it cannot be "
            "merged. Leave it out."
        ]
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        return [f"{kind}. {SUPPORTED}"]
    variants = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": config.alora_invocation_tokens,
        "use_qalora": config.use_qalora,
        "use_bdlora": getattr(config, "use_bdlora", None),
        "arrow_config": config.arrow_config,
        "velora_config": getattr(config, "velora_config", None),
        "monteclora_config": getattr(config, "monteclora_config", None),
    }
    reasons = [f"uses {name}={value!r}. {SUPPORTED}" for name, value in variants.items() if value]
    if config.init_lora_weights not in NEUTRAL_INITIALISATIONS:
        initialisation = f"init_lora_weights={config.init_lora_weights!r}"
        reasons.append(f"changes its base's weights ({initialisation}). {SUPPORTED}")
    return reasons


def open_lora(name: str, location: Location, config: LoraConfig, base: Base) -> Expert:
    """Open a LoRA adapter. Its small factors are read now, as float32; they are meta tensors before the download.

    Raises:
        MergeError: if a file is missing or damaged, or the adapter does not fit the base.
    """
    main = location.find_weights()
    if main is None:
        raise MergeError(f"{location} has no weights: it holds none of {', '.join(ADAPTER_FILES)}.")
    factors: dict[tuple[str, bool], dict[str, StoredTensor]] = defaultdict(dict)
    stored: dict[str, StoredTensor] = {}
    for key, tensor in location.open_weights(main).items():
        if ".original_module." in key:  # bias="all" stores what modules_to_save has replaced
            continue
        module = WRAPPER.sub(".", key.removeprefix("base_model.model."))
        if match := LOW_RANK_KEY.match(module):
            factors[match["module"], bool(match["embedding"])][match["side"]] = tensor
        else:
            stored[module] = tensor
    places = base.skeleton.places([*stored, *(f"{module}.weight" for module, _ in factors)])

    problems: list[str] = []
    task_vectors: dict[Place, TaskVector] = {}
    head: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        place = places[key]
        found = base.at(place)
        if ".lora_" in key:
            problems.append(f"{tensor.path} holds {key}, which is no part of a plain LoRA adapter. {SUPPORTED}")
        elif place is None or found is None:
            head[key] = tensor
        elif found[0].shape != tensor.shape:
            problems.append(mismatch(key, found[0], tensor, base.skeleton, place))
        elif base.is_tied(place):  # PEFT's save_embedding_layers stores embeddings that nobody changed
            if not same_values(tensor, found[0]):
                problems.append(_unties(location, key))
        elif is_mergeable(tensor):
            task_vectors[place] = Difference(tensor, found[1])
    for (module, embedding), sides in factors.items():
        place = places[f"{module}.weight"]
        found = base.at(place)
        if set(sides) != {"A", "B"}:
            problems.append(f"{main} holds only one of lora_A and lora_B of {module}. Save the adapter again.")
        elif place is None or found is None:
            problems.append(
                f"{location} changes {module}, which the base {base.location} does not have. "
                "Check base_model: it must be the model that the adapter was trained on."
            )
        elif base.is_tied(place):
            problems.append(_unties(location, module))
        else:
            factor = _low_rank(module, sides, embedding, config, found[1], str(main))
            if isinstance(factor, str):
                problems.append(f"{factor} The base's {module}.weight is {found[0].shape}. Check base_model.")
            else:
                task_vectors[place] = dataclasses.replace(factor, stored=task_vectors.get(place))
    if problems:
        raise MergeError(abridged(problems))

    model_class = task_class(config.task_type, base.config)
    if model_class and model_class is not base.skeleton.model_class and not head:
        skeleton = Skeleton(model_class, base.config)
        missing = missing_parameter(skeleton, skeleton.places(base.tensors))
        if missing:
            raise MergeError(
                f"{location} was trained as {model_class.__name__} (task_type={str(config.task_type)!r}), whose "
                f"{missing} is in neither the adapter nor the base {base.location}. "
                "Check base_model: it must be the model that the adapter was trained on, with its head."
            )
    head_config = task_config(base.config, location.folder, model_class, head) if head else None
    return Expert(
        name=name,
        location=location,
        kind=f"LoRA r={_ranks(task_vectors)}",
        model_class_name=model_class.__name__ if model_class else None,
        task_vectors=task_vectors,
        head=Head(head_config, head) if head_config else None,
    )


def _low_rank(
    module: str, sides: dict[str, StoredTensor], embedding: bool, config: LoraConfig, layout: Layout, file: str
) -> LowRank | str:
    """The task vector of a module, or the sentence that says why its factors do not fit."""
    a, b = (read_whole(sides[side]).float() for side in "AB")
    if not a.is_meta and not b.is_meta and not math.isfinite(a.sum() + b.sum()):
        raise MergeError(
            f"{file}: lora_A or lora_B of {module} holds a NaN or an infinity. "
            "A damaged adapter cannot be merged: train or download it again, or leave it out."
        )
    r = a.shape[0]
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    scaling = alpha / (r**0.5 if config.use_rslora else r)
    left, right = (a.T, b.T) if embedding else (b, a)
    left, right = left.flatten(1), right.flatten(1)
    if left.shape != (layout.rows, r) or right.shape != (r, layout.width):
        return f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {module} in {file} do not fit."
    return LowRank((scaling * left).contiguous(), right.contiguous(), layout, file)


def _unties(location: Location, name: str) -> str:
    return (
        f"{location} changes {name} alone, which the base's config.json ties to another parameter "
        "(tie_word_embeddings): its model has two matrices where the base has one. "
        "Exclude this module from the adapter."
    )


def _ranks(task_vectors: dict[Place, TaskVector]) -> str:
    ranks: set[int] = {vector.right.shape[0] for vector in task_vectors.values() if isinstance(vector, LowRank)}
    return "/".join(str(rank) for rank in sorted(ranks))
