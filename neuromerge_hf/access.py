"""How files are downloaded from the Hub."""

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """How files are downloaded from the Hub. The names are those of huggingface_hub and transformers.

    Attributes:
        token: the Hub token for private and gated repositories.
        local_files_only: whether to use only what is in the Hub's cache already.
        force_download: whether to download files that are in the cache already.
        cache_dir: the folder of the Hub's cache; None for the usual one.
    """

    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    force_download: bool = False
    cache_dir: str | os.PathLike[str] | None = None


PUBLIC = Access()
"""The access of somebody who says nothing about it."""
