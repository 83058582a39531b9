"""Models that somebody made to harm: links, escapes, sizes, code. A merge refuses them, or none of it comes through.

A case puts one to three traps into copies of a base, a fine-tune and an adapter, and plans, merges, describes and
pushes them; or it puts traps into a merge that is finished, and pushes that. Links lead to files that hold `CANARY`,
and code writes a file. Both must stay where they are.
"""

import functools
import json
import logging
import os
import random
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

import loopback_environment
from campaign import Case, Outcome
from neuromerge_hf import MergeError, merge, merge_recipe, plan_merge
from neuromerge_hf.hub.push import push
from neuromerge_hf.model_cards import write_card
from tiny_models import save_llamas

CANARY = "canary-in-a-coal-mine"

RAN = "code-ran"
"""The file that code in a model writes."""

SLOW = 20
"""The seconds of processor time from which a case is a defect."""

ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\u202eb", "a\u2066b", "a\nError: b", "a\rb", "\x00")

SIZES = ("num_hidden_layers", "vocab_size", "hidden_size", "num_experts", "num_attention_heads", "intermediate_size",
         "num_labels", "max_position_embeddings", "head_dim", "num_key_value_heads")  # fmt: skip

NO_CLASSES = ("pipeline", "Trainer", "AutoModel", "LlamaConfig", "utils", "__name__", "PreTrainedModel", "../x", "")

COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "NOTICE.txt",
          "tokenizer.model", "vocab.txt", "chat_template.jinja", "README.md", "preprocessor_config.json",
          "adapter_config.json", "modeling_x.py")  # fmt: skip

Trap = Callable[[Path, random.Random], object]


@functools.cache
def _originals() -> Path:
    root = Path(tempfile.mkdtemp(prefix="neuromerge-hostile-"))
    save_llamas(root)
    merge([root / "math", root / "code"], root / "merged", base_model=root / "base")
    return root


def try_case(seed: int, folder: Path) -> Case:
    """Try the traps of a seed. Whatever is refused with one `MergeError` is refused rightly."""
    rng = random.Random(seed)
    hub, _ = loopback_environment.start()
    outside, models = folder / "outside", folder / "models"
    outside.mkdir()
    (outside / "secret.txt").write_text(CANARY)
    finished = rng.random() < 0.25
    for name in ("merged",) if finished else ("base", "math", "code"):
        shutil.copytree(_originals() / name, models / name)
    traps = rng.sample(list(MERGED_TRAPS if finished else TRAPS), rng.randint(1, 3))
    what = ", ".join(trap.__name__.strip("_") for trap in traps)
    for trap in traps:
        with suppress(ValueError, LookupError, RecursionError, StopIteration):  # an earlier trap has damaged the file
            trap(rng.choice([path for path in models.iterdir() if path.is_dir()]), rng)
    before = _state(outside), {} if finished else _state(models)
    output, repo_id = folder / "out" / "merged", f"hostile/case-{seed}"
    refusal, started = "", time.process_time()
    with _heard() as texts:
        try:
            if finished:
                output = models / "merged"
                write_card(output)
            else:
                named = {path.name.partition("@")[0]: path for path in models.iterdir()}
                experts, base = [named["math"], named["code"]], named["base"]
                tokenizer = rng.choice(["base", "math", "union"])
                texts.append(str(plan_merge(experts, base_model=base, tokenizer=tokenizer)))
                texts.append(str(merge(experts, output, base_model=base, tokenizer=tokenizer)))
            push(output, repo_id)
        except MergeError as error:
            refusal = str(error)
            texts.append(refusal)
    texts += [path.read_text() for path in output.glob("README.md") if not path.is_symlink()]
    published = hub.files(repo_id) if repo_id in hub.repos else {}
    written = {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file() and not path.is_symlink()}
    leaked = [name for name, data in {**published, **written}.items() if CANARY.encode() in data]
    problems = [f"the canary is in {name}" for name in leaked]
    problems += [f"shown: {text!r}" for text in texts if any(map(_acts, text))]
    problems += ["code ran"] * any(folder.rglob(RAN))
    problems += ["files changed"] * (before != (_state(outside), {} if finished else _state(models)))
    seconds = time.process_time() - started
    problems += [f"it took {seconds:.0f} s"] * (seconds > SLOW)
    hub.repos.pop(repo_id, None)
    if problems:
        return Case(seed, Outcome.WRONG, f"{what}: {problems} {refusal}")
    return Case(seed, Outcome.REFUSED if refusal else Outcome.CORRECT, f"{what}: {refusal}")


def _acts(letter: str) -> bool:
    """Whether a character acts on a terminal, or turns the direction of text."""
    return letter not in "\n\t" and (
        unicodedata.category(letter) == "Cc" or "\u202a" <= letter <= "\u202e" or "\u2066" <= letter <= "\u2069"
    )


def _state(folder: Path) -> dict[str, object]:
    """What lies in a folder, links as such."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings that the libraries log in the block."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("neuromerge_hf", "transformers", "peft", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield texts
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


# ---------------------------------------------------------------------------------------------------------------- links


def _with_canary(path: Path) -> bytes:
    """The content of a file, or of a new one, with the canary in it. It stays readable as what it was."""
    content = path.read_bytes() if path.is_file() else b"{}" if path.suffix == ".json" else b""
    if path.suffix == ".json":
        return json.dumps({**json.loads(content), "canary": CANARY}).encode()
    return content + f"\n{CANARY}\n".encode()


def _link_out(model: Path, rng: random.Random, name: str | None = None) -> None:
    """Put a link in the place of a file: absolute, relative, or through others."""
    path = model / (name or rng.choice(COPIED))
    outside = model.parents[1] / "outside"
    target = outside / f"{model.name}-{path.name}"
    target.write_bytes(_with_canary(path))
    path.unlink(missing_ok=True)
    how = rng.choice(["absolute", "relative", "chain", "folder"])
    if how == "relative":
        path.symlink_to(os.path.relpath(target, model))
    elif how == "chain":
        (model / f".{path.name}").unlink(missing_ok=True)
        (model / f".{path.name}").symlink_to(target)
        path.symlink_to(f".{path.name}")
    elif how == "folder":
        if not (model / "inner").is_symlink():
            (model / "inner").symlink_to(outside)
        path.symlink_to(f"inner/{target.name}")
    else:
        path.symlink_to(target)


def _link_to_nothing(model: Path, rng: random.Random) -> None:
    path = model / rng.choice([*COPIED, "model.safetensors", "adapter_model.safetensors"])
    path.unlink(missing_ok=True)
    path.symlink_to(rng.choice(["nowhere", "/nowhere/at/all", path.name]))


def _link_of_weights(model: Path, rng: random.Random) -> None:
    """Weights on another disk, as many people have them."""
    for path in model.glob("*model.safetensors"):
        path.rename(model.parents[1] / f"{model.name}.safetensors")
        path.symlink_to(model.parents[1] / f"{model.name}.safetensors")


def _linked_folder(model: Path, rng: random.Random) -> None:
    if not model.is_symlink():
        model.rename(model.parents[1] / model.name)
        model.symlink_to(model.parents[1] / model.name)


def _linked_inside(model: Path, rng: random.Random) -> None:
    (model / "terms.txt").write_text("terms")
    (model / "LICENSE.md").unlink(missing_ok=True)
    (model / "LICENSE.md").symlink_to("terms.txt")


def _more_templates(model: Path, rng: random.Random) -> None:
    outside = model.parents[1] / "outside"
    (outside / "x.jinja").write_text(CANARY)
    if not (model / "additional_chat_templates").exists():
        (model / "additional_chat_templates").symlink_to(outside)


# ---------------------------------------------------------------------------------------------------- texts and numbers


def _change_json(path: Path, **changes: object) -> None:
    if path.is_file() and not path.is_symlink():
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _config(model: Path) -> Path:
    return next(model / name for name in ("adapter_config.json", "config.json") if (model / name).exists())


def _escape_in_config(model: Path, rng: random.Random) -> None:
    keys = ("model_type", "hidden_act", "note", "torch_dtype", "task_type", "peft_type", "base_model_name_or_path",
            "transformers_version", "id2label", "architectures", rng.choice(ESCAPES))  # fmt: skip
    key, text = rng.choice(keys), rng.choice(ESCAPES)
    value = {"0": text} if key == "id2label" else [text] if key == "architectures" else text
    _change_json(_config(model), **{key: value})


def _escape_in_name(model: Path, rng: random.Random) -> None:
    (model / f"LICENSE{rng.choice(ESCAPES[:-1])}".replace("/", "")).write_text("terms")


def _name_without_unicode(model: Path, rng: random.Random) -> None:
    Path(os.fsdecode(os.fsencode(model) + rng.choice([b"/LICENSE\xff", b"/vocab\xe9.txt"]))).write_text("terms")


def _folder_with_escape(model: Path, rng: random.Random) -> None:
    if "@" not in model.name:
        ending = rng.choice([*map(os.fsencode, ESCAPES[:-1]), b"\xff"])
        model.rename(os.fsdecode(os.fsencode(f"{model}@") + ending.replace(b"/", b"")))


def _escape_in_card(model: Path, rng: random.Random) -> None:
    text = rng.choice([*ESCAPES, "<script>alert(1)</script>", "](javascript:x)", "|`", "-->\n# Mine"])
    head = {"license": "other", "license_name": text, "license_link": text, "language": [text], "datasets": [text]}
    body = f"# {text}\n```bibtex\n@misc{{x, title={{{text}}}}}\n```\n"
    path = model / "README.md"
    path.unlink(missing_ok=True)
    path.write_text(f"---\n{yaml.safe_dump(head, allow_unicode=rng.random() < 0.5)}---\n{body}")


def _hostile_card(model: Path, rng: random.Random) -> None:
    laughs = "\n".join([f"a0: &a0 [{'x,' * 9}]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 9))])
    heads = (f"x: !!python/object/apply:os.system ['touch {model / RAN}']", "a: " + "[" * 5000, laughs, "x: [", "\x00",
             "license: *nothing", "license: [[mit]]", "language: false", "- mit", "")  # fmt: skip
    bodies = ("```bibtex\n@a{" * 20_000, "```" + " \n" * 50_000, "x" * 2_000_000, "\n" * 900_000, "\udcff")
    path = model / "README.md"
    path.unlink(missing_ok=True)
    text = f"---\n{rng.choice(heads)}\n---\n{rng.choice(bodies)}"
    path.write_bytes(text.encode(errors="surrogateescape"))


def _escape_in_tensor(model: Path, rng: random.Random) -> None:
    for path in model.glob("*model.safetensors"):
        prefix = "base_model.model." if path.name.startswith("adapter") else ""
        tensors = load_file(path) | {f"{prefix}x{rng.choice(ESCAPES)}.weight": torch.zeros(2, 2)}
        save_file(tensors, path.resolve(), metadata={"format": "pt"})


def _escape_in_token(model: Path, rng: random.Random) -> None:
    path = model / "tokenizer.json"
    if not path.is_file() and (model.parent / "base").is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (model.parent / "base" / name).is_file():
                (model / name).unlink(missing_ok=True)
                shutil.copyfile(model.parent / "base" / name, model / name)
    if path.is_file() and not path.is_symlink():
        content = json.loads(path.read_text())
        content["model"]["vocab"][rng.choice(ESCAPES)] = rng.choice([13, 39, 500])
        path.write_text(json.dumps(content))


def _huge_size(model: Path, rng: random.Random) -> None:
    value = rng.choice([20_000, 10**6, 10**9, 10**15, 10**30, -1, 0])
    _change_json(_config(model), **{rng.choice([*SIZES, "r", "lora_alpha"]): value})


def _huge_file(model: Path, rng: random.Random) -> None:
    name = rng.choice(["config.json", "LICENSE", "README.md", "generation_config.json"])
    path = model / name
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    path.write_bytes(content + b" " * 17_000_000)


def _deep_json(model: Path, rng: random.Random) -> None:
    path = model / rng.choice(["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
    path.unlink(missing_ok=True)
    path.write_text(rng.choice(["[" * 100_000, '{"a":' * 100_000, "{", "[]", "\x00"]))


# ----------------------------------------------------------------------------------------------------------------- code


def _no_class(model: Path, rng: random.Random) -> None:
    _change_json(_config(model), architectures=[rng.choice(NO_CLASSES)])


def _own_code(model: Path, rng: random.Random) -> None:
    (model / "modeling_x.py").unlink(missing_ok=True)
    (model / "modeling_x.py").write_text(f"from pathlib import Path\nPath({str(model / RAN)!r}).touch()\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_x.X")
    own = {"model_type": "own"} if rng.random() < 0.5 else {}
    _change_json(_config(model), auto_map=auto, **own)
    _change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_x.X", "modeling_x.X"]})
    _change_json(_config(model), architectures=["X"], attn_implementation=rng.choice(["hostile/kernel", "eager", 7]))


class _Runs:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def _pickle(model: Path, rng: random.Random) -> None:
    for path in model.glob("*model.safetensors"):
        bin_name = "adapter_model.bin" if path.name.startswith("adapter") else "pytorch_model.bin"
        torch.save({"model.embed_tokens.weight": _Runs(model / RAN)}, model / bin_name)
        if rng.random() < 0.7:
            path.unlink()


def _template(model: Path, rng: random.Random) -> None:
    code = f"{{{{ cycler.__init__.__globals__.os.system('touch {model / RAN}') }}}}"
    if rng.random() < 0.5:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        (model / "chat_template.jinja").write_text(code)
    else:
        _change_json(model / "tokenizer_config.json", chat_template=code)


def _tokenizer_paths(model: Path, rng: random.Random) -> None:
    outside = model.parents[1] / "outside"
    (outside / "vocab.txt").write_text(f"[UNK]\n{CANARY}\n")
    names = ("vocab_file", "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "name_or_path")
    kinds = ("BertTokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
    settings = dict.fromkeys(names, str(outside / "vocab.txt"))
    _change_json(model / "tokenizer_config.json", tokenizer_class=rng.choice(kinds), **settings)


# ------------------------------------------------------------------------------------------------------ finished merges


def _link_in_merge(model: Path, rng: random.Random) -> None:
    names = ("README.md", "neuromerge.png", "merge_report.json", "recipe.yaml", "config.json", "tokenizer.json",
             "LICENSE-math", "README.before-push.md", "picture.png")  # fmt: skip
    _link_out(model, rng, rng.choice(names))


def _linked_heads(model: Path, rng: random.Random) -> None:
    outside = model.parents[1] / "outside"
    (outside / "math").mkdir(exist_ok=True)
    (outside / "math" / "config.json").write_text(json.dumps({"canary": CANARY}))
    if rng.random() < 0.5:
        (model / "heads").mkdir(exist_ok=True)
        if not (model / "heads" / "math").exists():
            (model / "heads" / "math").symlink_to(outside / "math")
    elif not (model / "heads").exists():
        (model / "heads").symlink_to(outside)


def _other_recipe(model: Path, rng: random.Random) -> None:
    """A recipe that names files outside of the models."""
    path = model / "recipe.yaml"
    if path.is_symlink():
        return
    content = yaml.safe_load(path.read_text())
    name = rng.choice(["../outside/secret.txt", str(model.parents[1] / "outside" / "secret.txt"), "a\x00b", "..", 7])
    content["base_model"] = {"id": str(model), "sha256": {name: "0" * 64}}
    path.write_text(yaml.safe_dump(content))
    with suppress(MergeError):
        merge_recipe(path, model.parents[1] / "again")


def _escape_in_report(model: Path, rng: random.Random) -> None:
    path, text = model / "merge_report.json", rng.choice(ESCAPES)
    if path.is_symlink():
        return
    content = json.loads(path.read_text())
    expert = content["experts"][0]
    where = rng.choice(["name", "id", "kind", "model_class", "ignored", "head", "notes", "parents"])
    if where == "notes":
        content["notes"] = [text]
    elif where == "parents":
        content["parents"][0] |= {"license": text, "license_name": text, "citations": [text], "task": text}
    else:
        expert[where] = [text] if where in ("ignored", "head") else text
    path.write_text(json.dumps(content))


TRAPS: tuple[Trap, ...] = (
    _link_out, _link_out, _link_to_nothing, _link_of_weights, _linked_folder, _linked_inside, _more_templates,
    _escape_in_config, _escape_in_name, _name_without_unicode, _folder_with_escape, _escape_in_card, _hostile_card,
    _escape_in_tensor, _escape_in_token, _huge_size, _huge_size, _huge_file, _deep_json, _no_class, _own_code, _pickle,
    _template, _tokenizer_paths,
)  # fmt: skip
MERGED_TRAPS: tuple[Trap, ...] = (_link_in_merge, _link_in_merge, _linked_heads, _other_recipe, _escape_in_report)
