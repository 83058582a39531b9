"""Opening the base model."""

from transformers import PretrainedConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import Skeleton
from neuromerge_hf.sources.expert import Base, check_complete, stored_form, without_tied_copies
from neuromerge_hf.storage.files import CHECKPOINT_FILES
from neuromerge_hf.storage.location import Location


def open_base(location: Location, config: PretrainedConfig, skeleton: Skeleton) -> Base:
    """Open the base's weights, from their headers alone."""
    main = location.find_weights()
    if main is None:
        raise MergeError(f"The base {location} has no weights: it holds none of {', '.join(CHECKPOINT_FILES)}.")
    tensors = location.open_weights(main)
    places = skeleton.places(tensors)
    tensors = without_tied_copies(tensors, places)
    known = stored_form(tensors, places)
    if not known:
        raise MergeError(
            f"{main} holds no parameter of the class {skeleton.model_class.__name__}. Check its config.json."
        )
    check_complete(location, skeleton, tensors, places, main)
    return Base(location, config, skeleton, tensors, places, *skeleton.stored_layouts(known))
