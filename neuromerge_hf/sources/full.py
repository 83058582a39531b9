"""Experts that are full checkpoints."""

from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError, abridged
from neuromerge_hf.skeleton import ParameterRef, Skeleton, model_class_of, skeleton_of
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.checks import VOCABULARY_REMEDY, check_complete, is_mergeable, mismatch, without_tied_copies
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.heads import Head
from neuromerge_hf.sources.stored_forms import to_base_form
from neuromerge_hf.sources.task_vector import Difference, TaskVector
from neuromerge_hf.sources.untying import missing_copies, renamed, separable
from neuromerge_hf.storage.files import CHECKPOINT_FILES
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor
from neuromerge_hf.text import listed


def check_architecture(
    location: Location,
    config: PretrainedConfig,
    base: Skeleton,
    base_location: Location,
    trust_remote_code: bool = False,
) -> list[str]:
    """Compare the architectures of an expert and the base, from their configurations alone.

    Returns:
        The first difference, as an error message; empty if there is none.
    """
    ours, theirs = base.model.config.model_type, config.model_type
    if ours != theirs:
        return [
            f"{location} is a {theirs} model, but the base {base_location} is a {ours} model. "
            "Only fine-tunes of the same base can be merged."
        ]
    try:
        skeleton = skeleton_of(base.model_class, config, base.most)
        model_class = model_class_of(config, location.folder, trust_remote_code, default=base.model_class)
        skeleton_of(model_class, config, base.most)
        of_base = skeleton_of(model_class, base.model.config, base.most)
    except MergeError as error:
        return [f"{location.folder / 'config.json'}: {problem}" for problem in error.problems]
    shapes = skeleton.shapes
    for name in sorted(set(shapes) ^ set(base.shapes)):
        has, lacks = (location, base_location) if name in shapes else (base_location, location)
        return [f"The architectures differ: {has} has the parameter {name}, and {lacks} does not. Check base_model."]
    ties, base_ties = set(skeleton.ties.items()), set(base.ties.items())
    if model_class is not base.model_class:
        # A head that only the expert has is kept unmerged. A tied head is not stored, so the base must tie it too.
        own = skeleton_of(model_class, config).ties.items()
        ties |= own
        base_ties |= own & of_base.ties.items()
    separate = separable(base).items()  # for an expert with untied embeddings, the base is untied too
    for tie in sorted(ties - base_ties | base_ties - ties - separate):
        one, other = (location, base_location) if tie in ties else (base_location, location)
        return [
            f"The architectures differ: the config.json of {one} ties {tie[0]} to {tie[1]} (tie_word_embeddings), and "
            f"that of {other} does not. Save the base and every expert with the same setting."
        ]
    for name, shape in base.shapes.items():
        if shapes[name] == shape or base.is_head(name):
            continue
        if base.is_vocabulary(name) and shapes[name][1:] == shape[1:]:
            return [
                f"The vocabularies differ: {name} is {shapes[name]} in {location}, but {shape} in the base "
                f"{base_location}, and one of them has no tokenizer files that tell which tokens these are. "
                f"{VOCABULARY_REMEDY}"
            ]
        return [
            f"The architectures differ: {name} is {shapes[name]} in {location}, but {shape} in the base "
            f"{base_location}. Check base_model."
        ]
    return []


def has_untied_embeddings(
    location: Location, config: PretrainedConfig, base: Skeleton, trust_remote_code: bool = False
) -> bool:
    """Whether an expert has two embedding matrices where the base has tied ones that can be untied."""
    if not base.ties or getattr(config, "tie_word_embeddings", True):
        return False
    skeleton = skeleton_of(model_class_of(config, location.folder, trust_remote_code, base.model_class), config)
    return any(name in skeleton.shapes and name not in skeleton.ties for name in separable(base))


def open_full(
    name: str, location: Location, config: PretrainedConfig, base: Base, trust_remote_code: bool = False
) -> Expert:
    """Open a full checkpoint as an expert, from the headers of its files.

    Raises:
        MergeError: if a file or a parameter is missing or damaged, or does not fit the base.
    """
    main = location.find_weights()
    if main is None:
        raise MergeError(f"{location} has no weights: it holds none of {', '.join(CHECKPOINT_FILES)}.")
    model_class = model_class_of(config, location.folder, trust_remote_code, default=base.skeleton.model_class)
    skeleton = skeleton_of(model_class, config)
    tensors = location.open_weights(main)
    own_refs = skeleton.refs(tensors)
    tensors = without_tied_copies(tensors, own_refs)
    try:
        check_complete(location, skeleton, tensors, own_refs, main)
    except MergeError as error:
        raise MergeError(f"{error}{_unnamed_class_advice(config, model_class)}") from error
    for copy, original in missing_copies(tensors, base.skeleton, base.copies).items():
        tensors[copy], own_refs[copy] = renamed(tensors[original], copy), own_refs[original]
    tensors, base_refs, computed = to_base_form(tensors, base.skeleton.refs(tensors), base, main)

    task_vectors: dict[ParameterRef, TaskVector] = {}
    head: dict[str, StoredTensor] = {}
    ignored, problems = [], []
    for key, tensor in tensors.items():
        ref = base_refs[key]
        own = own_refs.get(key, ref)
        found = base.at(ref)
        if own is None:
            ignored.append(key)
        elif base.has_unplaced(key):
            problems.append(base.unplaced_message(location, key))
        elif ref is None or found is None or (base.skeleton.is_head(ref.parameter) and found[0].shape != tensor.shape):
            head[own.piece or own.parameter] = tensor
            if skeleton.other_shape({key: (own, tensor.shape)}):
                problems.append(
                    f"{key} is {tensor.shape} in {tensor.path}, but {skeleton.shapes[own.parameter]} by the sizes in "
                    "the config.json beside it. Save or download the model again."
                )
        elif found[0].shape != tensor.shape:
            problems.append(mismatch(key, found[0], tensor, base.skeleton, ref))
        elif is_mergeable(found[0]) != is_mergeable(tensor):
            problems.append(
                f"{key} is {tensor.dtype} in {tensor.path}, but {found[0].dtype} in the base's {found[0].path}. "
                "Quantised weights cannot be merged: save the expert in float32, float16 or bfloat16."
            )
        elif is_mergeable(tensor):
            task_vectors[ref] = Difference(tensor, found[1])
    if problems:
        raise MergeError(abridged(problems))
    return Expert(
        name,
        location,
        "full",
        model_class.__name__,
        task_vectors,
        Head(config, head) if head else None,
        ignored,
        computed,
        _notes(location, skeleton, base, task_vectors),
    )


def _unnamed_class_advice(config: PretrainedConfig, assumed: type[PreTrainedModel]) -> str:
    """The end of an error message for a checkpoint whose configuration names no class that transformers knows."""
    named = next(iter(config.architectures or ()), None)
    if named == assumed.__name__:
        return ""
    names = f"names {named}, which transformers does not know" if named else "names no class"
    return (
        f' Its config.json {names} ("architectures"), so it was taken for a {assumed.__name__}. If it was trained as a '
        "class that lacks this parameter, name that class there."
    )


def _notes(
    location: Location, skeleton: Skeleton, base: Base, task_vectors: Mapping[ParameterRef, TaskVector]
) -> list[str]:
    """A note that names the base's parameters which an expert's model lacks; an empty list if it lacks none."""
    refs = {name: ref for name in base.tensors if (ref := base.refs[name]) and is_mergeable(base.tensors[name])}
    own = skeleton.refs(refs)
    lacked = [
        ref.parameter
        for name, ref in sorted(refs.items())
        if ref not in task_vectors and ((known := own[name]) is None or known.parameter in skeleton.pooling_layer)
    ]
    if not lacked:
        return []
    return [
        f"{location.public_name}, a {skeleton.model_class.__name__}, was trained without {listed(lacked)}: it does not "
        "change what the base has there."
    ]
