"""The class of the models that `AutoMergedModel` returns. They save and push their whole merge."""

import functools
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.access import Access
from neuromerge_hf.folder.assets import BESIDE_CARD, copy_merge, remove_older_weights
from neuromerge_hf.folder.directory import complete_directory
from neuromerge_hf.folder.report import REPORT_NAME
from neuromerge_hf.hub.push import check_repo_id, push
from neuromerge_hf.loading.changes import Changes, compare
from neuromerge_hf.loading.loaded_merge import LoadedMerge, settings_of
from neuromerge_hf.model_cards import write_card
from neuromerge_hf.storage.files import HEADS

logger = logging.getLogger(__name__)

PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags", "template")
"""The keyword arguments of `save_pretrained` that are passed on to `push`."""


class MergedModelMixin(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Saves and pushes a merged model with its tokenizer, recipe, report, heads and card.

    A model of this class that was not loaded from a merge (for example, made from a configuration) is saved as usual.
    """

    _origin: LoadedMerge | None = None

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
        """Save the model with its tokenizer, recipe, report, the experts' heads and the card.

        If the merge's files still hold all of the model and no argument asks for another form, they are copied.
        Otherwise the model's own class saves it. If the merge's parameters were changed, the card says so. A new folder
        appears once it is complete.

        Args:
            save_directory, is_main_process, state_dict, max_shard_size, variant: as in transformers.
            push_to_hub: push the saved folder. `token`, ``repo_id`` (by default the folder's name) and the other
                arguments of `push_to_hub` are used for that.
            **kwargs: other arguments of the class's own `save_pretrained`.
        """
        push_arguments = {name: kwargs.pop(name) for name in ("repo_id", *PUSH_ARGUMENTS) if name in kwargs}
        form = {"state_dict": state_dict, "max_shard_size": max_shard_size, "variant": variant, **kwargs}
        form = {name: value for name, value in form.items() if value is not None}
        origin = self._merge_to_save()
        if origin is None:
            form |= {"push_to_hub": push_to_hub, "token": token, **push_arguments}
            return super().save_pretrained(save_directory, is_main_process, **form)
        folder = Path(save_directory)
        changes = self._compare(origin, state_dict)
        is_copied = not form and changes.is_equal and self._is_in_files(origin)
        if not is_main_process:
            if not is_copied:
                super().save_pretrained(save_directory, is_main_process, **form)
            return None
        with complete_directory(folder) as made:
            if is_copied:
                copy_merge(origin.folder, made)
            else:
                super().save_pretrained(made, is_main_process, **form)
                remove_older_weights(made)
                origin.add_companions(made, changes.changed)
            if (made / REPORT_NAME).is_file():
                write_card(made, name=folder.absolute().name)
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

        If the merge's files still hold all of the model, they are uploaded. Otherwise it is first saved to a folder,
        which stays if the push fails.

        Args:
            max_shard_size: the largest size of a weight file. By default the merge's files keep their sizes, and a
                changed model is saved with transformers' default.
            tags: further tags for the card.
            repo_id, commit_message, commit_description, private, token, revision, create_pr, template: see
                `neuromerge_hf.hub.push`.

        Returns:
            The commit.

        Raises:
            MergeError: if the push fails. The message says where the model is on this machine, and how to resume.
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
        origin = self._merge_to_save()
        if origin is None:
            commit: CommitInfo = super().push_to_hub(repo_id, **arguments)
            return commit
        location = origin.location
        is_local = location.commit is None
        if is_local and max_shard_size is None and self._is_in_files(origin) and self._compare(origin).is_equal:
            with origin.keeping_card():
                return push(location.folder, repo_id, template=template, **arguments)
        check_repo_id(repo_id)
        if not is_local and not origin.head:  # loading fetched neither heads nor pictures
            replace(location, access=Access(token)).download([f"{HEADS}/*", *BESIDE_CARD], ignore=None)
        pushes = origin.cache / "pushes"
        pushes.mkdir(parents=True, exist_ok=True)
        folder = pushes / f"{repo_id.rpartition('/')[2]}-{secrets.token_hex(4)}"
        self.save_pretrained(folder, max_shard_size=max_shard_size)
        commit = push(folder, repo_id, template=template, **arguments)
        shutil.rmtree(folder)
        return commit

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle looks a class up by its name, and would find the architecture's own class.
        make, (cls, *arguments), *state = super().__reduce_ex__(max(2, protocol))
        return (_make_again, (make, _plain_class(cls), *arguments), *state)

    def _merge_to_save(self) -> LoadedMerge | None:
        """The merge to save with the model; None if the model's class must save it alone.

        It is None for a model that was not loaded from a merge, for one whose merge has been deleted, and for one with
        an adapter, because then only the adapter is saved.
        """
        if self._origin is None or getattr(self, "_hf_peft_config_loaded", False):
            return None
        if not self._origin.folder.is_dir():
            logger.warning(
                "The merge in %s, from which this model was loaded, is gone. The model is saved without its recipe, "
                "report, heads and card.",
                self._origin.folder,
            )
            return None
        return self._origin

    def _compare(self, origin: LoadedMerge, state_dict: Mapping[str, Tensor] | None = None) -> Changes:
        live = self.state_dict() if state_dict is None else state_dict
        model_class = _plain_class(type(self))
        config = _stored_config(model_class, origin.loaded_folder)
        is_quantised = getattr(self, "hf_quantizer", None) is not None
        return compare(live, origin.loaded_folder, model_class, config, is_quantised=is_quantised)

    def _is_in_files(self, origin: LoadedMerge) -> bool:
        """Whether the merge's files hold this model, provided that its parameters are equal to theirs."""
        if origin.head is not None or getattr(self, "hf_quantizer", None) or settings_of(self) != origin.settings:
            return False
        model_class = _plain_class(type(self))
        stored = _stored_config(model_class, origin.folder)
        if model_class.__name__ not in (stored.architectures or []) or stored.dtype not in (None, self.dtype):
            return False
        # If one parameter alone was cast to a smaller dtype than that of the files, they do not hold it.
        dtypes = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}
        return all(torch.promote_types(dtype, self.dtype) == dtype for dtype in dtypes)


@functools.cache
def merged_class(cls: type) -> Any:
    """Make the subclass of a model class that has `MergedModelMixin`.

    It keeps the class's name and module, by which transformers identifies it. Each class has one such subclass.
    """
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (MergedModelMixin, cls), names)


def _plain_class(cls: type) -> type[PreTrainedModel]:
    """The architecture's own class, from which `merged_class` made `cls`."""
    plain: type[PreTrainedModel] = cls.__mro__[cls.__mro__.index(MergedModelMixin) + 1]
    return plain


def _stored_config(model_class: Any, folder: Path) -> PretrainedConfig:
    config: PretrainedConfig = model_class.config_class.from_pretrained(folder)
    return config


def _make_again(make: Any, cls: type, *arguments: Any) -> Any:
    return make(merged_class(cls), *arguments)
