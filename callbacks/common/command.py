"""The command that repeats a merge."""

import shlex
from dataclasses import asdict
from pathlib import Path

from neuromerge_hf.config import is_number
from neuromerge_hf.options import options_of
from neuromerge_hf.spec import MergeSpec, Runtime

SECRET = ("token",)
"""Options that the command omits, because logs show it."""


def merge_command(spec: MergeSpec, runtime: Runtime, target: Path) -> str:
    """The ``neuromerge merge`` command with all settings of a spec and a runtime that are not defaults."""
    words = ["neuromerge", "merge", *spec.models, "--output", str(target), "--method", spec.config.method]
    default = asdict(type(spec.config)())
    settings = {name: value for name, value in asdict(spec.config).items() if value != default[name]}
    for kind in (spec, runtime):
        for option in options_of(type(kind)):
            value = getattr(kind, option.name)
            if value != option.default and option.name not in ("config", *SECRET):
                settings[option.name] = value
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        if value and all(map(is_number, values)):  # the weights of a mean are one option, and patterns are several
            values = [",".join(map(str, values))]
        for each in values:
            words += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    return shlex.join(words)
