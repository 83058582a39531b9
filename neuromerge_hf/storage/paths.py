"""The paths that users give."""

import os
from pathlib import Path

from huggingface_hub import constants

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.documents import reason_of

LONGEST_NAME = 255
"""The length in bytes that file systems allow. The system checks it only in folders that exist."""


def user_cache() -> Path:
    """The folder in the Hub's home folder that keeps finished merges and the hashes of large files."""
    return Path(constants.HF_HOME, "neuromerge")


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
        if "\0" in text:
            raise ValueError("it has a null character")
        if max(map(len, os.fsencode(path).split(os.sep.encode()))) > LONGEST_NAME:
            raise ValueError(f"no name in it may be longer than {LONGEST_NAME} bytes")
    except (OSError, ValueError, RuntimeError) as error:  # too long, not to be encoded, the home of an unknown user
        raise MergeError(f"{parameter}={text!r:.200} is no path that can be used here: {reason_of(error)}.") from error
    return path


def user_folder(value: object, parameter: str) -> Path:
    """Return the path of a folder that a user has given.

    Raises:
        MergeError: if it is no folder that this process may write in.
    """
    path = user_path(value, parameter)
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise MergeError(f"{parameter}={str(path)!r} is no folder that this process may write in. Make it first.")
    return path
