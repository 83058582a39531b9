"""Odd arguments of the functions and of the command line: each is refused by name, or does what it says.

A case calls one function of the library with one argument replaced, or runs one command with odd words. A command may
end with the exit codes of success, of a wrong input and of wrong usage, and with no other.
"""

import functools
import os
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loopback_environment
from campaign import Case, Outcome
from commands import run
from mutations import VALUES, Hung, limited
from neuromerge_hf import AutoMergedModel, MergeError, compare_methods, merge, merge_recipe, plan_merge, tune_lambdas
from neuromerge_hf.api import add_results, plan_recipe
from neuromerge_hf.callbacks.transformers import NeuroMergeCallback
from neuromerge_hf.config import config_classes
from neuromerge_hf.folder.results import load_results
from neuromerge_hf.hub.push import push
from neuromerge_hf.methods.average import AverageConfig
from neuromerge_hf.model_cards import write_card
from neuromerge_hf.options import options_of
from neuromerge_hf.spec import MergeSpec, Runtime
from neuromerge_hf.tuning.search import TuningGrid
from tiny_models import save_llamas

LONG = "x" * 300

ODD: tuple[Any, ...] = (
    *VALUES, b"x", ".", "/", "..", "~", "~nouser/x", LONG, f"a/{LONG}", "/dev/null", "/proc/self/mem", "a\0b",
    "\udcff", "a b", "a@b@c",
    "@", "a/@", "owner/name@", "https://huggingface.co/a/b", "a//b", "-x", "--", "*", "model.safetensors", (), ((),),
    set(),
    {None: 1}, [b"x"], [Path()], Path(LONG), Path("~nouser"), object, object(), len, lambda *_: 1, NotImplemented,
    ..., 1j, range(3),
    10**400, -(10**400), 1e-320, "1" * 400, "５", "cuda:99", "meta", "cpu:7", "int8", "5GB", "0GB", "-5GB", "1e9GB",
    10**30,
)  # fmt: skip

OPTIONS = [each.name for kind in (MergeSpec, Runtime) for each in options_of(kind)]

COMMANDS = ("merge", "plan", "card", "push", "compare", "nothing", "")

SLOW = 30
"""The seconds from which a case is a defect."""

PIPE = "a-pipe"


def score(model: Any) -> float:
    return float(next(model.parameters()).sum())


@functools.cache
def _models() -> Path:
    root = Path(tempfile.mkdtemp(prefix="neuromerge-arguments-"))
    save_llamas(root)
    merge([root / "math", root / "code"], root / "merged", base_model=root / "base", threads=1)
    os.mkfifo(root / PIPE)
    return root


def _calls(out: Path) -> dict[Callable[..., Any], dict[str, Any]]:
    """Each function with arguments that are right."""
    root = _models()
    experts, base = [root / "math", root / "code"], root / "base"
    merging = {"models": experts, "base_model": base}
    results = [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.5}]
    return {
        plan_merge: {**merging, "output_dir": out / "merged"},
        merge: {**merging, "output_dir": out / "merged", "config": AverageConfig()},
        merge_recipe: {"path": root / "merged" / "recipe.yaml", "output_dir": out / "merged"},
        plan_recipe: {"path": root / "merged" / "recipe.yaml", "output_dir": out / "merged"},
        add_results: {"folder": root / "merged", "results": results},
        _add_result: {"folder": root / "merged", **results[0]},
        load_results: {"path": root / "merged" / "merge_report.json"},
        write_card: {"folder": root / "merged", "repo_id": "a/b", "template": None},
        push: {"folder": root / "merged", "repo_id": "arguments/merged", "tags": (), "template": None,
        "revision": None},
        AutoMergedModel.from_pretrained: {**merging, "config": AverageConfig(), "merge_cache_dir": out / "cache",
        "head": None},
        tune_lambdas: {**merging, "evaluate": score, "grid": TuningGrid((0.0,), (1.0,), rounds=0), "densities": None,
                       "metric": None, "output_dir": None, "work_dir": None, "auto_class": None},
        compare_methods: {**merging, "evaluate": score, "methods": [AverageConfig()], "output_dir": None,
                          "work_dir": None, "auto_class": None},
        NeuroMergeCallback: {**merging, "when": "save", "output_dir": out, "checkpoints": None, "tune": False,
                             "average_checkpoints": None, "hub_model_id": None, "push_to_hub": False,
                             "evaluate": True},
        TuningGrid: {"parallel": (0.0,), "orthogonal": (1.0,), "rounds": 1},
        **{each: {option.name: None for option in options_of(each)} for each in config_classes()},
    }  # fmt: skip


def _add_result(folder: Path, **result: Any) -> None:
    add_results(folder, [result])


WEIGHTS = {"merge": 3, "plan_merge": 6, "tune_lambdas": 1, "compare_methods": 1, "from_pretrained": 2}
"""How often a function is called; others 4 times. The first ones are slow."""


def try_case(seed: int, folder: Path) -> Case:
    """Call a function or run a command with odd arguments."""
    hub, _ = loopback_environment.start()
    rng = random.Random(seed)
    before = os.getcwd()
    os.chdir(folder)
    try:
        with limited(SLOW), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _command(seed, folder, rng) if rng.random() < 0.3 else _call(seed, folder, rng)
    except Hung as error:
        return Case(seed, Outcome.WRONG, str(error))
    finally:
        os.chdir(before)
        hub.repos.clear()


def _call(seed: int, folder: Path, rng: random.Random) -> Case:
    calls = _calls(folder / "out")
    function = rng.choices(
        list(calls), [1 if each in config_classes() else WEIGHTS.get(each.__name__, 4) for each in calls]
    )[0]
    arguments = dict(calls[function])
    names = list(arguments)
    if "base_model" in names:
        names += [name for name in OPTIONS if name != "token"]
    name = rng.choice(names)
    value = rng.choice((*ODD, _models() / PIPE, _models() / "base" / "config.json"))
    what = f"{function.__qualname__}({name}={value!r:.80})"
    if isinstance(arguments.get(name), list | tuple) and rng.random() < 0.5:
        value = rng.choice([[value], (value, *arguments[name]), [*arguments[name], value]])
        what = f"{function.__qualname__}({name}=[... {value!r:.80}])"
    if function in config_classes():
        arguments = {}
    try:
        function(**{**arguments, name: value})
    except MergeError as error:
        return Case(seed, Outcome.REFUSED, f"{what}: {error}")
    except Exception as error:
        known = ("has no argument", "an option of a merge")
        rightly = isinstance(error, TypeError) and any(words in str(error) for words in known)
        outcome = Outcome.REFUSED if rightly else Outcome.TRACEBACK
        return Case(seed, outcome, f"{what}: {type(error).__name__}: {error}")
    return Case(seed, Outcome.CORRECT, what)


def _command(seed: int, folder: Path, rng: random.Random) -> Case:
    root = _models()
    command = rng.choice(COMMANDS)
    words: list[Any] = {
        "merge": [root / "math", "--base-model", root / "base", "--output", folder / "merged", "--method", "average"],
        "plan": [root / "code"],
        "card": [root / "merged"],
        "push": [root / "merged", "arguments/merged"],
        "compare": [root / "math", "--base-model", root / "base", "--eval", "math:sqrt", "--method", "average"],
    }.get(command, [])
    odd = [each for each in ODD if isinstance(each, str | int | float | Path) and "\0" not in str(each)]
    options = [f"--{name.replace('_', '-')}" for name in (*OPTIONS, "density", "scale", "exclude", "results",
    "template",
               "repo_id", "tag", "eval", "tune", "tune_density", "private", "traceback", "help", "nothing",
               "commit_message")]  # fmt: skip
    odd += [root / PIPE, root / "merged" / "recipe.yaml", *rng.sample(options, 6)]
    for _ in range(rng.randint(1, 2)):
        kind = rng.random()
        if kind < 0.4 and words:
            words[rng.randrange(len(words))] = rng.choice(odd)
        elif kind < 0.9:
            words += [rng.choice(options), rng.choice(odd)]
        else:
            words.insert(rng.randrange(len(words) + 1), rng.choice(odd))
    if "--token" in words:  # huggingface_hub would keep it
        words = [word for word in words if word != "--token"]
    what = f"{command} {' '.join(map(str, words)):.200}"
    try:
        done = run(*([command] if command else []), *words)
    except UnicodeEncodeError:  # a terminal does not pass such words on either
        return Case(seed, Outcome.REFUSED, what)
    if done.exception and not isinstance(done.exception, SystemExit):
        return Case(seed, Outcome.TRACEBACK, f"{what}: {done.exception!r}")
    if done.exit_code not in (0, 1, 2) or ("Traceback" in done.output and "--traceback" not in words):
        return Case(seed, Outcome.TRACEBACK, f"{what}: exit code {done.exit_code}: {done.output[-300:]}")
    return Case(seed, Outcome.REFUSED if done.exit_code else Outcome.CORRECT, f"{what}: {done.output[-200:]}")
