"""The command that makes a merge again."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.planning.resolve import ModelId

NOT_ON_COMMAND_LINE = ("token", "tuned_on")
"""Options of `merge` that are left out: a token is no one's business."""


def merge_command(
    experts: Sequence[ModelId], base: str, target: Path, config: MergeConfig, options: Mapping[str, Any]
) -> str:
    """``neuromerge merge`` with the arguments of a `neuromerge_hf.merge`."""
    words = ["neuromerge", "merge", *map(str, experts), "--base-model", base, "--output", str(target)]
    words += ["--method", config.method]
    default = type(config)()
    settings = {name: value for name, value in asdict(config).items() if value != getattr(default, name)}
    for name, value in {**settings, **options}.items():
        option = "--" + name.replace("_", "-")
        if name in NOT_ON_COMMAND_LINE or value is None or value is False:
            continue
        elif value is True:
            words.append(option)
        else:
            for part in value if isinstance(value, list | tuple) else [value]:
                words += [option, str(part).removeprefix("torch.")]
    return shlex.join(words)
