"""A merged model's card: what its folder says, brought together and rendered."""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError, TemplateSyntaxError

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import RECIPE_NAME, Ingredient, Recipe, file_hash, load_recipe
from neuromerge_hf.folder.report import ExpertReport, MergeReport, load_report
from neuromerge_hf.model_cards import markdown, tables
from neuromerge_hf.model_cards.licences import remarks
from neuromerge_hf.model_cards.limits import limits
from neuromerge_hf.model_cards.methods import METHODS, MethodText
from neuromerge_hf.model_cards.picture import NAME as PICTURE
from neuromerge_hf.model_cards.quick_start import head_start, quick_start
from neuromerge_hf.model_cards.tasks import Task, takes_text_alone, task_of, task_of_own_class
from neuromerge_hf.storage.files import companion_files, licence_files, tokenizer_files
from neuromerge_hf.text import readable_size
from neuromerge_hf.version import __version__

TEMPLATE = "merge.md.jinja"


@dataclass(frozen=True)
class MergeCard:
    """Everything that a card says; `render` writes it down.

    Attributes:
        name: the title.
        repo_id: the repository that it is for; None for a folder on this machine.
        recipe: what was merged, and how.
        report: what the merge did.
        config: the merged model's ``config.json``.
        weights: the sha256 of every weight file, by its path in the folder.
        terms: the names of files with the parents' licences and notices.
        has_tokenizer: whether the folder has a tokenizer.
        has_chat: whether it has a chat template.
        has_code: whether it has code of its own.
    """

    # From whoever writes the card
    name: str
    repo_id: str | None
    # From the merged model's folder
    recipe: Recipe
    report: MergeReport
    config: dict[str, Any]
    weights: dict[str, str]
    terms: list[str]
    has_tokenizer: bool
    has_chat: bool
    has_code: bool

    @property
    def method(self) -> MethodText:
        """The method in words."""
        return METHODS[self.recipe.config.method]

    @classmethod
    def of(cls, folder: Path, repo_id: str | None = None, name: str | None = None) -> "MergeCard":
        """The card of a folder that a merge wrote.

        Raises:
            MergeError: if the folder lacks its recipe or its report.
        """
        report, recipe = load_report(folder), load_recipe(folder / RECIPE_NAME)
        return cls(
            name=name or (repo_id.rpartition("/")[2] if repo_id else os.path.basename(os.path.abspath(folder))),
            repo_id=repo_id,
            recipe=recipe,
            report=report,
            config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
            weights=_hashes(folder),
            terms=[path.name for path in licence_files(folder)],
            has_tokenizer=bool(tokenizer_files(folder)),
            has_chat=_has_chat(folder),
            has_code=bool(companion_files(folder, ("*.py",))),
        )

    @cached_property
    def task(self) -> Task | None:
        """What the merged model's class is for."""
        known = task_of((self.config.get("architectures") or [None])[0])
        return known or (task_of_own_class(self.config) if self.has_code else None)

    @property
    def load_as(self) -> str:
        """What to pass to `from_pretrained`."""
        return self.repo_id or f"./{self.name}"

    # ---------------------------------------------------------------------------------------------- what went in

    @property
    def ingredients(self) -> list[Ingredient]:
        """The base and then the experts."""
        return [self.recipe.base_model, *self.recipe.models]

    @property
    def base_link(self) -> str:
        """The base in Markdown."""
        return _link(self.recipe.base_model, self.report.model_names[0])

    @property
    def expert_links(self) -> list[str]:
        """The experts in Markdown."""
        named = zip(self.recipe.models, self.report.experts, strict=True)
        return [_link(model, expert.name) for model, expert in named]

    def task_of_expert(self, expert: ExpertReport, stated: str | None) -> str:
        """What an expert is for: as its card says, or else by its class."""
        task = task_of(expert.model_class)
        return stated or (task.pipeline_tag if task else None) or ""

    @property
    def local(self) -> list[str]:
        """The names of the folders that the recipe needs, because these models are not on the Hub."""
        named = zip(self.ingredients, self.report.model_names, strict=True)
        return [name for model, name in named if not model.revision]

    @property
    def remarks(self) -> list[str]:
        """Sentences on the parents' licences."""
        links = [self.base_link, *self.expert_links]
        return remarks(list(zip(links, self.report.parents, strict=True)))

    @property
    def limits(self) -> list[str]:
        """What the model is not, in sentences."""
        return limits(self)

    @property
    def citations(self) -> list[str]:
        """The parents' BibTeX entries, each once, but for that of the method, which the template has."""
        entries = dict.fromkeys(entry for parent in self.report.parents for entry in parent.citations)
        return [entry for entry in entries if self.method.url not in entry]

    # ------------------------------------------------------------------------------------------------- rendering

    @property
    def quick_start(self) -> str | None:
        """Code that loads the model, if an Auto class of transformers does."""
        task = self.task
        if task is None:
            return None
        return quick_start(
            task,
            self.load_as,
            has_tokenizer=self.has_tokenizer and takes_text_alone(self.config),
            has_chat=self.has_chat,
            own_code=self.own_code,
        )

    @property
    def head_start(self) -> str | None:
        """Code that loads it with an expert's own head, if there are any."""
        heads = [expert.name for expert in self.report.experts if expert.head and not self.report.loaded_head]
        return head_start(self.load_as, heads[0], own_code=self.own_code) if heads else None

    @property
    def own_code(self) -> bool:
        """Whether loading it runs code that is beside its weights."""
        return self.has_code and "auto_map" in self.config

    def render(self, template: str | os.PathLike[str] | None = None) -> str:
        """The whole card, without its metadata.

        Args:
            template: a file with a Jinja template of the user's. It may extend "merge.md.jinja" and replace its blocks.

        Raises:
            MergeError: if the template cannot be read or rendered.
        """
        environment = _environment()
        try:
            if template is None:
                chosen = environment.get_template(TEMPLATE)
            else:
                chosen = environment.from_string(Path(template).read_text(encoding="utf-8"))
            return chosen.render(
                card=self, report=self.report, recipe=self.recipe, tables=tables, picture=PICTURE, version=__version__
            )
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            if template is None:
                raise
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise MergeError(f"The template {os.fspath(template)}{line} cannot be used: {error}") from error


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("neuromerge_hf.model_cards", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: what strangers wrote goes through the filters
    )
    environment.filters |= {
        "text": markdown.escaped,
        "code": markdown.code,
        "block": markdown.block,
        "size": readable_size,
        "sentence_list": markdown.sentence_list,
    }
    return environment


def _link(model: Ingredient, name: str) -> str:
    """A model in Markdown: a link where it is on the Hub."""
    if not model.revision:
        return markdown.code(name)
    return f"[{markdown.code(model.id)}](https://huggingface.co/{quote(model.repo)})"


def _has_chat(folder: Path) -> bool:
    if companion_files(folder, ("chat_template*",)):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("heads/*/*.safetensors")])
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_hash, paths)
        return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}
