"""Deleting merges of a training that are no longer wanted."""

import logging
import shutil
from contextlib import suppress

from neuromerge_hf.callbacks.common.places import ROOT, Places
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.replaceable import check_replaceable

logger = logging.getLogger(__name__)


def delete_merge(places: Places) -> None:
    """Delete a merged model, and the models beside it from which it was made. Warn if people added files to it."""
    merged = places.merged
    if merged.is_dir():
        try:
            check_replaceable(merged)
        except MergeError as error:
            logger.warning("%s\nSo it is kept.", error)
            return
        shutil.rmtree(merged)
    for folder in (places.trained, places.averaged):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (merged.parent, places.trained.parent):
        if ROOT in folder.parts:
            with suppress(OSError):  # it is not there, or holds something else
                folder.rmdir()
