"""What `AutoMergedModel` returns: the architecture's own model, which is saved and pushed as the merge that it is."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.folder.assets import BESIDE_CARD, CARD, copy_file, copy_merge, remove_older_weights
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.folder.report import REPORT_NAME, load_report
from neuromerge_hf.hub.push import check_repo_id, push
from neuromerge_hf.loading.parameter_sums import parameter_sums
from neuromerge_hf.model_cards import write_card
from neuromerge_hf.storage.files import COMPANIONS, HEADS, companion_files, tokenizer_files
from neuromerge_hf.storage.location import Location

TO_PUSH = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags", "template")
"""The arguments of `save_pretrained` that are `push`'s."""


@dataclass(frozen=True)
class LoadedMerge:
    """The merge that a model was loaded from, and what the model was like then.

    Attributes:
        location: of the merge. Without a token: it is pickled with the model.
        cache: a folder for models on their way to the Hub.
        head: whose task head the model was loaded with.
        is_whole: whether the merge's files hold just this model, in its class and dtype.
        parameters: see `parameter_sums`.
        settings: the contents of its configuration files.
    """

    location: Location
    cache: Path
    head: str | None
    is_whole: bool
    parameters: dict[str, Any]
    settings: Sequence[str]


class MergedModelMixin(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Saves and pushes a merged model with its tokenizer, recipe, report, heads and card."""

    _origin: LoadedMerge

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model, and beside it tokenizer, recipe, report, the experts' heads and the card.

        As long as the model is as it was loaded, and no argument asks for another form, the files that the merge wrote
        are copied. Otherwise its class saves it; and if its parameters were changed, its card says so.

        Args:
            save_directory, is_main_process, state_dict, max_shard_size, variant: as in transformers.
            push_to_hub: push the folder then. `token`, ``repo_id`` (by default the folder's name) and the arguments of
                `push_to_hub` are for that.
            **kwargs: other arguments of the class's own `save_pretrained`.
        """
        push_arguments = {name: kwargs.pop(name) for name in ("repo_id", *TO_PUSH) if name in kwargs}
        form = {"state_dict": state_dict, "max_shard_size": max_shard_size, "variant": variant, **kwargs}
        form = {name: value for name, value in form.items() if value is not None}
        if self._has_adapter:
            form |= {"push_to_hub": push_to_hub, "token": token, **push_arguments}
            return super().save_pretrained(save_directory, is_main_process, **form)
        folder = Path(save_directory)
        changed = self._is_changed()
        if form or changed or not self._is_in_files():
            super().save_pretrained(save_directory, is_main_process, **form)
            if is_main_process:
                remove_older_weights(folder)
                self._add_companions(folder, changed)
        elif is_main_process:
            copy_merge(self._origin.location.folder, folder)
        if not is_main_process:
            return None
        if (folder / REPORT_NAME).is_file():
            write_card(folder)
        if push_to_hub:
            push(folder, push_arguments.pop("repo_id", folder.absolute().name), token=token, **push_arguments)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: str | list[str] | None = None,
        template: str | os.PathLike[str] | None = None,
    ) -> CommitInfo:
        """Upload the model with its tokenizer, recipe, report, the experts' heads and the card, as one commit.

        As long as the model is as it was loaded, the files that the merge wrote are uploaded. Otherwise it is saved
        first, to a folder that stays where it is if the push fails.

        Args:
            max_shard_size: the largest size of a weight file. By default the files stay as they are; those of a changed
                model are transformers' size.
            tags: more tags for the card.
            repo_id, commit_message, commit_description, private, token, revision, create_pr, template: see
                `neuromerge_hf.hub.push`.

        Raises:
            MergeError: if the push failed. The message says where the model is on this machine, and how to go on.
        """
        arguments: dict[str, Any] = {
            "commit_message": commit_message,
            "commit_description": commit_description,
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
            "tags": [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])],
        }
        if self._has_adapter:
            commit: CommitInfo = super().push_to_hub(repo_id, **arguments)
            return commit
        location = self._origin.location
        if location.commit is None and max_shard_size is None and self._is_in_files() and not self._is_changed():
            with self._without_card_of_another_push():
                return push(location.folder, repo_id, template=template, **arguments)
        check_repo_id(repo_id)
        if location.commit and not self._origin.head:  # loading needed neither heads nor pictures
            replace(location, token=token).download([f"{HEADS}/*", *BESIDE_CARD], ignore=None)
        self._origin.cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{repo_id.rpartition('/')[2]}-", dir=self._origin.cache))
        try:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
        except BaseException:  # what is there is half a model
            shutil.rmtree(folder)
            raise
        commit = push(folder, repo_id, template=template, **arguments)
        shutil.rmtree(folder)
        return commit

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle looks a class up by its name, where it would find the architecture's own.
        make, (cls, *arguments), *state = super().__reduce_ex__(max(2, protocol))
        plain = cls.__mro__[cls.__mro__.index(MergedModelMixin) + 1]
        return (_make_again, (make, plain, *arguments), *state)

    @property
    def _has_adapter(self) -> bool:
        """Whether an adapter was added, which its class then saves and pushes alone."""
        return getattr(self, "_hf_peft_config_loaded", False)

    def _is_changed(self) -> bool:
        return parameter_sums(self) != self._origin.parameters

    def _is_in_files(self) -> bool:
        """Whether the merge's files are this model, unless its parameters were changed."""
        return self._origin.is_whole and _settings(self) == self._origin.settings

    @contextmanager
    def _without_card_of_another_push(self) -> Iterator[None]:
        """Leave a card in the cache as it is: what people wrote into one repository's is not for another."""
        folder = self._origin.location.folder
        card = folder / CARD
        if folder.parent != self._origin.cache.parent or not card.is_file():  # in a folder of the user's
            yield
            return
        before = card.read_bytes()
        try:
            yield
        finally:
            card.write_bytes(before)

    def _add_companions(self, folder: Path, changed: bool) -> None:
        """Put beside the weights in `folder` what else belongs to the merge."""
        source = self._origin.location.folder
        companions = companion_files(source, (*COMPANIONS, *BESIDE_CARD))
        if tokenizer_files(folder):  # the user's, who may have added tokens
            companions = [path for path in companions if path not in tokenizer_files(source)]
        for path in companions:
            if not (folder / path.name).exists():
                copy_file(path, folder / path.name)
        copy_file(source / RECIPE_NAME, folder / RECIPE_NAME)
        if (source / REPORT_NAME).is_file():
            report = load_report(source)
            head = self._origin.head or report.loaded_head
            notes = [*report.notes, *_other_dtype(source, folder)]
            replace(report, changed=report.changed or changed, loaded_head=head, notes=notes).save(folder)
        if self._origin.head is None:
            for path in source.glob(f"{HEADS}/*/*"):
                copy_file(path, folder / path.relative_to(source))


def as_merged_model(
    model: PreTrainedModel, location: Location, cache: Path, head: str | None, stored: PretrainedConfig
) -> PreTrainedModel:
    """Give a model that was loaded from a merge the `save_pretrained` and `push_to_hub` of `MergedModelMixin`.

    Args:
        model: its class is replaced by a subclass of the same name.
        location: of the merge.
        cache: a folder for models on their way to the Hub.
        head: whose task head was put on the merge.
        stored: the configuration in the files that the model was loaded from.
    """
    is_whole = (
        head is None
        and type(model).__name__ in (stored.architectures or [])
        and stored.dtype in (None, model.dtype)
        and getattr(model, "hf_quantizer", None) is None
    )
    origin = LoadedMerge(replace(location, token=None), cache, head, is_whole, parameter_sums(model), _settings(model))
    if location.commit and location.id == location.repo and head is None:
        # PEFT writes it into adapters as their base. It is a folder of the cache otherwise.
        model.name_or_path = location.id
    plain: type = type(model)
    model.__class__ = _merged_class(plain)
    model._origin = origin  # type: ignore[assignment]
    return model


@functools.cache
def _merged_class(cls: type) -> type[PreTrainedModel]:
    """A subclass with the name and the module of the architecture's own, by which transformers knows it."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (MergedModelMixin, cls), names)


def _make_again(make: Any, cls: type, *arguments: Any) -> Any:
    return make(_merged_class(cls), *arguments)


def _other_dtype(source: Path, folder: Path) -> list[str]:
    """A note on the dtype of the weights in `folder`, if it is not that of the merge in `source`."""
    configs = [json.loads((each / "config.json").read_text(encoding="utf-8")) for each in (source, folder)]
    merged, saved = [config.get("dtype", config.get("torch_dtype")) for config in configs]
    if not merged or not saved or merged == saved:
        return []
    return [f"The weights were converted to {saved}; the merge has them in {merged}."]


def _settings(model: PreTrainedModel) -> list[str]:
    generation_config = getattr(model, "generation_config", None)
    return [model.config.to_json_string(), generation_config.to_json_string() if generation_config else ""]
