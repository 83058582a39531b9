"""The paths that users give."""

import os
from pathlib import Path

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.documents import reason_of


def user_path(value: object, parameter: str) -> Path:
    """Return a path that a user has given, with the home folder in place of ``~``.

    Raises:
        MergeError: if it is no path, or none that a file can have.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise MergeError(f"{parameter} must be the path of a file or folder, not {value!r:.200}.")
    try:
        path = Path(text).expanduser()
        path.exists()
        os.fsencode(path)
        if "\0" in text:
            raise ValueError("it has a null character")
    except (OSError, ValueError, RuntimeError) as error:  # too long, not to be encoded, the home of an unknown user
        raise MergeError(f"{parameter}={text!r:.200} is no path that can be used here: {reason_of(error)}.") from error
    return path
