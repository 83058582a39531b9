"""Functions that several commands share."""

import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from neuromerge_hf.cli.messages import fitted
from neuromerge_hf.cli.options import method_options
from neuromerge_hf.config import DEFAULT_METHOD, config_class
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.output import check_unused
from neuromerge_hf.spec import OPTION_NAMES, RUNTIME_NAMES

if TYPE_CHECKING:
    from neuromerge_hf.config import MergeConfig

COMMAND_OPTIONS = ("method", "tune", "tune_density")
"""Options that are not in `MergeSpec` and cannot be combined with a recipe."""


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let the signals that end a process raise `SystemExit`, so that temporary files are removed as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signals = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in signals:  # not those that are ignored, as after nohup
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def echo(found: Any, as_json: bool) -> None:
    """Print what a command found: its summary, or its `to_dict` as JSON."""
    text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else str(found)
    typer.echo(text if as_json else fitted(text, sys.stdout.isatty()))


def check_output_early(output: Path, overwrite: bool) -> None:
    """Check an output directory before torch is imported, unless its path cannot be looked at: a plan says why."""
    try:
        target = output.expanduser().resolve()
        target.exists()
    except (OSError, RuntimeError, ValueError):
        return
    check_unused(target, overwrite)


def models_or_file(models: list[str] | None, config: Path | None) -> list[str]:
    """The models that a command was given, or the file that describes the merge."""
    if bool(models) == (config is not None):
        raise typer.BadParameter(
            "Name the models to merge, or a file that describes the merge (--config), and not both."
        )
    return models or [str(config)]


def is_recipe(context: typer.Context, models: list[str]) -> bool:
    """Whether the only argument is a recipe.

    Raises:
        MergeError: if an option is given that the recipe sets itself.
    """
    if len(models) != 1 or not (models[0].endswith((".yaml", ".yml")) or context.params.get("config")):
        return False
    of_spec = (name for name in OPTION_NAMES if name not in (*RUNTIME_NAMES, "config"))
    names = [*of_spec, *method_options(), *COMMAND_OPTIONS]
    sources = {name: context.get_parameter_source(name) for name in names if name in context.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise MergeError(f"The recipe {models[0]} says this itself: leave {options} out.")
    return True


def merge_options(context: typer.Context) -> dict[str, Any]:
    """The keyword arguments of `merge` from the options of a command, with the configuration of the method."""
    known = {name: value for name, value in context.params.items() if name in OPTION_NAMES}
    return {**known, "config": _method_config(context.params)} if "method" in context.params else known


def runtime_options(context: typer.Context) -> dict[str, Any]:
    """The keyword arguments of `Runtime` from the options of a command."""
    return {name: value for name, value in context.params.items() if name in RUNTIME_NAMES}


def _method_of(options: Mapping[str, Any]) -> str:
    """The method if none is named: NeuroMerging if one of its hyper-parameters is given, or to be tuned."""
    names = {field.name for field in dataclasses.fields(config_class("neuromerging"))} - {"exclude"}
    is_ours = options.get("tune") or any(options[name] is not None for name in names)
    return "neuromerging" if is_ours else DEFAULT_METHOD


def _method_config(options: Mapping[str, Any]) -> "MergeConfig":
    """The configuration of the chosen method, made from the options that were given."""
    method = options["method"] or _method_of(options)
    config = config_class(method)
    given = {name: options[name] for name in method_options() if options[name] is not None}
    unknown = given.keys() - {field.name for field in dataclasses.fields(config)}
    if unknown:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unknown))
        raise MergeError(f"--method {method} has no {names}: leave it out, or choose another method.")
    return config(**given)
