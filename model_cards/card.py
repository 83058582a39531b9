"""The content of a merged model's card, collected from its folder."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import RECIPE_NAME, ModelRecord, Recipe, load_recipe
from neuromerge_hf.folder.report import ExpertReport, MergeReport, load_report
from neuromerge_hf.model_cards import markdown
from neuromerge_hf.model_cards.licences import remarks
from neuromerge_hf.model_cards.quick_start import head_start, quick_start, sentence_start
from neuromerge_hf.model_cards.tasks import BACKBONE, Task, takes_text_alone, task_of, task_of_custom_class
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.files import companion_files, licence_files, tokenizer_files
from neuromerge_hf.storage.sentence_modules import module_files


@dataclass(frozen=True)
class MergeCard:
    """Everything that a card says. `render.render` turns it into text.

    Attributes:
        name: the title.
        repo_id: the repository that the card is for; None for a folder on this machine.
        recipe: the recipe of the merge.
        report: the report of the merge.
        config: the merged model's ``config.json``.
        terms: the names of the files with the parents' licences and notices.
        has_tokenizer: whether the folder has a tokenizer.
        has_chat: whether the folder has a chat template.
        has_code: whether the folder has custom code.
        has_modules: whether the folder has the modules of a SentenceTransformer.
        has_picture: whether the picture of the diagnostics lies in the folder.
    """

    # From whoever writes the card
    name: str
    repo_id: str | None
    # From the merged model's folder
    recipe: Recipe
    report: MergeReport
    config: dict[str, Any]
    terms: list[str]
    has_tokenizer: bool
    has_chat: bool
    has_code: bool
    has_modules: bool
    # From `write_card`
    has_picture: bool = True

    @property
    def method(self) -> type[MergeConfig]:
        """The configuration class of the method. It has the method's title, paper and summary."""
        return type(self.recipe.spec.config)

    @classmethod
    def of(
        cls, folder: Path, repo_id: str | None = None, name: str | None = None, recipe: Recipe | None = None
    ) -> "MergeCard":
        """Collect the card of a folder that a merge wrote.

        Args:
            folder: the folder.
            repo_id: the repository that the card is for; None for a folder on this machine.
            name: the title; by default the name of the repository or of the folder.
            recipe: the folder's recipe; by default it is read from the folder.

        Raises:
            MergeError: if the folder lacks its recipe or its report.
        """
        report, recipe = load_report(folder), recipe or load_recipe(folder / RECIPE_NAME)
        if not len(report.experts) == len(report.parents) - 1 == len(recipe.models):
            raise MergeError(f"{RECIPE_NAME} and the report in {folder} are of different merges. Merge again.")
        return cls(
            name=name or (repo_id.rpartition("/")[2] if repo_id else os.path.basename(os.path.abspath(folder))),
            repo_id=repo_id,
            recipe=recipe,
            report=report,
            config=load_json(folder / "config.json"),
            terms=[path.name for path in licence_files(folder)],
            has_tokenizer=bool(tokenizer_files(folder)),
            has_chat=_has_chat(folder),
            has_code=bool(companion_files(folder, ("*.py",))),
            has_modules=bool(module_files(folder)),
        )

    @cached_property
    def task(self) -> Task | None:
        """The task of the merged model's class; None if it is not known."""
        known = task_of((self.config.get("architectures") or [None])[0])
        return known or (task_of_custom_class(self.config) if self.has_code else None)

    @property
    def load_as(self) -> str:
        """The id or path to pass to `from_pretrained`."""
        return self.repo_id or f"./{self.name}"

    # --------------------------------------------------------------------------------------------- merged models

    @property
    def models(self) -> list[ModelRecord]:
        """The base and then the experts."""
        return [self.recipe.base_model, *self.recipe.models]

    @property
    def base_link(self) -> str:
        """The base in Markdown, as a link if it is on the Hub."""
        return _link(self.recipe.base_model, self.report.model_names[0])

    @property
    def expert_links(self) -> list[str]:
        """The experts in Markdown, as links if they are on the Hub."""
        named = zip(self.recipe.models, self.report.experts, strict=True)
        return [_link(model, expert.name) for model, expert in named]

    def task_of_expert(self, expert: ExpertReport, stated: str | None) -> str:
        """The task of an expert: the one `stated` by its card, or else that of its class."""
        task = task_of(expert.model_class)
        return stated or (task.pipeline_tag if task else None) or ""

    @property
    def local(self) -> list[str]:
        """The names of the folders that the recipe needs, because these models are not on the Hub."""
        named = zip(self.models, self.report.model_names, strict=True)
        return [name for model, name in named if not (model.revision or model.in_memory)]

    @property
    def in_memory(self) -> list[str]:
        """The names of the models that were in memory."""
        named = zip(self.models, self.report.model_names, strict=True)
        return [name for model, name in named if model.in_memory]

    @property
    def remarks(self) -> list[str]:
        """Sentences on the parents' licences."""
        links = [self.base_link, *self.expert_links]
        return remarks(list(zip(links, self.report.parents, strict=True)))

    @property
    def citations(self) -> list[str]:
        """The parents' BibTeX entries without duplicates and without the method's own, which the template has."""
        entries = dict.fromkeys(entry for parent in self.report.parents for entry in parent.citations)
        own = _keys(self.method.citation or "")
        return [
            entry for entry in entries if self.method.paper not in entry and not (_keys(entry) and _keys(entry) <= own)
        ]

    # ------------------------------------------------------------------------------------------------- rendering

    @property
    def quick_start(self) -> str | None:
        """Code that loads the model; None if no Auto class of transformers loads it."""
        task = self.task
        if self.is_sentence_transformer:
            return sentence_start(self.load_as, own_code=self.own_code)
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
    def is_sentence_transformer(self) -> bool:
        """Whether the merged model gives embeddings by sentence-transformers, and not only with an expert's head."""
        has_heads = any(expert.head for expert in self.report.experts)
        return self.has_modules and self.task == BACKBONE and not has_heads

    @property
    def head_start(self) -> str | None:
        """Code that loads the model with an expert's own head; None if no expert has one."""
        heads = [expert.name for expert in self.report.experts if expert.head and not self.report.loaded_head]
        return head_start(self.load_as, heads[0], own_code=self.own_code) if heads else None

    @property
    def own_code(self) -> bool:
        """Whether loading the model runs custom code from its folder."""
        return self.has_code and "auto_map" in self.config


def _link(model: ModelRecord, name: str) -> str:
    """A model in Markdown, as a link if it is on the Hub."""
    if not model.revision:
        return markdown.code(name)
    return f"[{markdown.code(model.id)}](https://huggingface.co/{quote(model.repo)})"


def _has_chat(folder: Path) -> bool:
    if companion_files(folder, ("chat_template*",)):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(load_json(settings).get("chat_template"))


def _keys(entries: str) -> set[str]:
    """The keys of BibTeX entries."""
    return set(re.findall(r"@\w+\{([^,\s]+),", entries))
