"""The command that repeats a merge."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path

from neuromerge_hf.config import config_classes, is_number
from neuromerge_hf.options import options_of
from neuromerge_hf.spec import MergeSpec, Runtime

SECRET = ("token",)
"""Options that the command omits, because logs show it."""


def merge_command(spec: MergeSpec, runtime: Runtime, target: Path) -> str | None:
    """The ``neuromerge merge`` command with all settings of a spec and a runtime that are not defaults.

    It runs in any folder, so paths that are there now are absolute in it. None if the method is the user's own, or the
    experts have names of the user's own, neither of which the command line knows.
    """
    if type(spec.config) not in config_classes() or spec.names:
        return None
    absolute = {model: _absolute(model) for model in (*spec.models, spec.base_model) if model}
    words = ["neuromerge", "merge", *(absolute[model] for model in spec.models)]
    words += ["--output", str(target), "--method", spec.config.method]
    default = asdict(type(spec.config)())
    settings = {name: value for name, value in asdict(spec.config).items() if value != default[name]}
    for kind in (spec, runtime):
        for option in options_of(type(kind)):
            value = getattr(kind, option.name)
            if value != option.default and option.name not in ("config", *SECRET):
                settings[option.name] = absolute.get(value, value)
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        if value and all(map(is_number, values)):  # the weights of a mean are one option, and patterns are several
            values = [",".join(map(str, values))]
        for each in values:
            words += _option(f"--{name.replace('_', '-')}", each)
    return shlex.join(words)


def _absolute(model: str) -> str:
    path = os.path.expanduser(model)
    return os.path.abspath(path) if os.path.isdir(path) else model


def _option(flag: str, value: object) -> list[str]:
    if value is True:
        return [flag]
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
