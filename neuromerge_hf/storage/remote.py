"""Reading the sizes and the headers of weight files on the Hub without downloading the files."""

from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # re-exported lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from neuromerge_hf.access import Access
from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.formats import check_header, read_header
from neuromerge_hf.storage.tensors import RemoteTensor

FIRST_BYTES = 100_000
"""The bytes of the first request, which hold most headers. For a small file it is a thousandth of the file."""


def list_sizes(repo: str, folder: str, commit: str, access: Access) -> dict[str, int] | None:
    """The size in bytes of each file in a folder of a repository, by file name; None if the Hub is not to be asked or
    cannot be reached.

    Args:
        folder: the folder with a slash at its end; "" for the top of the repository.
    """
    if access.local_files_only:
        return None
    try:
        entries = list(HfApi(token=access.token).list_repo_tree(repo, folder.rstrip("/") or None, revision=commit))
    except Exception:  # offline, unreachable or no access: the cached files may be enough
        return None
    return {PurePosixPath(entry.path).name: entry.size for entry in entries if isinstance(entry, RepoFile)}


def repository_sizes(
    repo: str, folder: str, revision: str | None, access: Access
) -> tuple[str | None, dict[str, int]] | None:
    """The commit of a revision, and the sizes of `list_sizes` at it; None if it is not to be asked or reached."""
    if access.local_files_only:
        return None
    try:
        info = HfApi(token=access.token).model_info(
            repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception:  # offline, unreachable or no access: the download says which
        return None
    files = [each for each in info.siblings or () if PurePosixPath(each.rfilename).parent == PurePosixPath(folder)]
    return info.sha, {PurePosixPath(each.rfilename).name: each.size or 0 for each in files}


def open_remote(path: Path, url: str, size: int, token: str | bool | None) -> dict[str, RemoteTensor]:
    """Open the tensors of a safetensors file on the Hub by name, from its header alone.

    Args:
        path: where a download will put the file.
        url: the address of the file on the Hub.
        size: the size of the file in bytes.

    Raises:
        MergeError: if the header cannot be downloaded, or the file is truncated or is not a safetensors file.
    """
    first_bytes = max(8, min(FIRST_BYTES, size // 1000))
    content = b""

    def read(start: int, stop: int) -> bytes:
        nonlocal content
        if len(content) < stop:
            content += _fetch(url, token, len(content), max(stop, first_bytes))
        return content[start:stop]

    try:
        header = read_header(path, size, read)
        # The rest of this copy is a hole, which takes no space.
        with NamedTemporaryFile(suffix=path.name) as copy:
            copy.write(content)
            copy.truncate(size)
            copy.flush()
            check_header(path, Path(copy.name))
    except MergeError:
        raise
    except Exception as error:  # the HTTP client's exceptions depend on its version
        raise MergeError(f"The header of {url} cannot be read: {error}. Check the network and try again.") from error
    return {name: RemoteTensor(name, dtype, shape, path) for name, (dtype, shape, _) in header.items()}


def _fetch(url: str, token: str | bool | None, start: int, stop: int) -> bytes:
    """Download the bytes [start, stop) of a file."""
    headers = build_hf_headers(token=token) | {"Range": f"bytes={start}-{stop - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise OSError("the server gives only whole files")
        content: bytes = response.read()
        return content
