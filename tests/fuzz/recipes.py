"""Recipes that are damaged, wrong or odd: a merge refuses them, or makes a folder that loads in transformers.

A case changes the recipe of a finished merge, plans it, and merges if the plan finds nothing. A recipe that only lost
or changed a hyper-parameter is merged with another one.
"""

import functools
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml

import loopback_environment
from campaign import Case, Outcome
from configs import not_loaded
from mutations import Hung, limited, mutate, spoil
from neuromerge_hf import MergeError, merge, merge_recipe
from neuromerge_hf.api import plan_recipe
from neuromerge_hf.methods.ties import TIESConfig
from tiny_models import save_llamas

KEYS = ("models", "base_model", "method", "config", "dtype", "tokenizer", "chat_template", "merge_heads",
"max_shard_size",
        "tuned_on", "versions", "weights", "x", "exclude", "threads", "trust_remote_code", "output_dir")  # fmt: skip

LINES = (
    "density: 2024-01-01", "density: 2024-13-45", "density: 0x" + "f" * 5000, "density: 1" + "0" * 5000,
    "density: 1e999",
    "density: .nan", "density: .inf", "density: 12:30:45", "density: 1_0", "density: !!float x",
    "density: !!python/name:os.system ",
    "density: !!python/object/apply:os.mkdir [ran]", "density: !!binary zzz", "density: !!set {a, b}",
    "density: !!omap [a: 1]",
    "density: !!timestamp 2001", "density: &a [*a]", "density: *nothing", "? [a, b]\n: c", "density: !x y",
    "density: \x07",
    "<<: {method: x}", "<<: [1]", "models: &m [*m]", "density: |\n  text", "density: =", "density: ~",
    "density: yes", "%YAML 9.9",
    "---", "...", "density: 'open", "\tdensity: 0.3", "density: {{}: 1}", "density: {[1]: 1}", "density: [[[[" * 30,
    "density: " + "[" * 5000, "density: " + "{a: " * 200, "dtype: !!int 3", "dtype: 2024-01-01",
    "method: 2001-12-14t21:59:43.10-05:00",
)  # fmt: skip
"""Lines of YAML that mean something else than they seem to, or nothing."""

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines that stand for 400 million texts."""

SLOW = 20
"""The seconds from which a case is a defect."""


@functools.cache
def _merged() -> Path:
    root = Path(tempfile.mkdtemp(prefix="neuromerge-recipes-"))
    save_llamas(root)
    merge([root / "math", root / "code"], root / "merged", base_model=root / "base", config=TIESConfig(), threads=1)
    return root


def try_case(seed: int, folder: Path) -> Case:
    """Change the recipe in one or two ways."""
    loopback_environment.start()
    rng = random.Random(seed)
    path = folder / "recipe.yaml"
    shutil.copyfile(_merged() / "merged" / "recipe.yaml", path)
    what = spoil(path, rng) if rng.random() < 0.15 else _changed(path, rng)
    try:
        with limited(SLOW), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan_recipe(path)
            if rng.random() < 0.5:
                merge_recipe(path, folder / "again", threads=1)
                problem = not_loaded(folder / "again")
                return Case(seed, Outcome.WRONG if problem else Outcome.CORRECT, f"{what}: {problem}")
    except MergeError as error:
        named = any(
            str(each) in str(error) for each in (path, *(_merged() / name for name in ("math", "code", "base")))
        )
        told = ("a folder", "must be", "is no path", "is not valid UTF-8", "would not be finite")
        by_name = any(words in str(error) for words in told)
        return Case(seed, Outcome.REFUSED if named or by_name else Outcome.WRONG, f"{what}: {error}")
    except Hung as error:
        return Case(seed, Outcome.WRONG, f"{what}: {error}")
    except Exception as error:
        return Case(seed, Outcome.TRACEBACK, f"{what}: {type(error).__name__}: {error}")
    return Case(seed, Outcome.CORRECT, what)


def _changed(path: Path, rng: random.Random) -> str:
    text = path.read_text()
    if rng.random() < 0.4:
        lines = text.splitlines()
        line = rng.choice([*LINES, BOMB + "models: *i", BOMB + "density: *i", BOMB + "config: {density: *i}"])
        number = rng.randrange(len(lines))
        own = lines[number]
        indent = own[: len(own) - len(own.lstrip())]
        value = line.partition(": ")[2]
        if rng.random() < 0.5 and ": " in own and value:
            line = f"{own.partition(': ')[0].lstrip()}: {value}"
        lines[number : number + rng.randrange(2)] = [indent + line]
        path.write_text("\n".join(lines), errors="surrogatepass")
        return f"line {number}: {line!r:.100}"
    content: Any = yaml.safe_load(text)
    content, done = mutate(content, rng, KEYS)
    if rng.random() < 0.2:
        content, more = mutate(content, rng, KEYS)
        done += f", {more}"
    try:
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    except (ValueError, RecursionError):  # YAML cannot write it
        path.write_text(repr(content) if "nested" not in done else "a: " + "[" * 1000)
    return done
