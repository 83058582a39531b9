"""The merge that a model was loaded from, and its files that are saved with the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from neuromerge_hf.folder.assets import BESIDE_CARD, hash_weights, merged_files, without_leading_out
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.folder.report import REPORT_NAME, load_report
from neuromerge_hf.loading.heads import folder_with_head
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.files import CARD, COMPANIONS, HEADS, companion_files, tokenizer_files
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.sentence_modules import module_files
from neuromerge_hf.storage.writing import copy_file, write_file


@dataclass(frozen=True)
class LoadedMerge:
    """The merge that a model was loaded from.

    Attributes:
        location: the location of the merge. It has no token, because it is pickled with the model.
        cache: the cache folder, which holds merges, links to heads, and models that are being pushed.
        head: the name of the expert whose task head was loaded; None for none.
        settings: the model's configurations at loading time, as JSON strings.
    """

    location: Location
    cache: Path
    head: str | None
    settings: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder of the merge."""
        return self.location.folder

    @property
    def loaded_folder(self) -> Path:
        """The folder whose files transformers loaded."""
        if self.head is None:
            return self.folder
        return folder_with_head(self.folder, self.folder / HEADS, self.head, self.cache)

    def add_companions(self, folder: Path, changed: bool) -> None:
        """Copy the merge's tokenizer, recipe, report, heads and other files to the weights in `folder`.

        Args:
            folder: the folder in which the model was saved.
            changed: whether its parameters differ from those of the merge. The report then says so.
        """
        companions = companion_files(self.folder, (*COMPANIONS, *BESIDE_CARD))
        if tokenizer_files(folder):  # the user's own tokenizer may have more tokens
            companions = [path for path in companions if path not in tokenizer_files(self.folder)]
        for path in without_leading_out([*companions, *module_files(self.folder)], self.location):
            copy = folder / path.relative_to(self.folder)
            if not copy.exists():
                copy_file(path, copy)
        copy_file(self.folder / RECIPE_NAME, folder / RECIPE_NAME)
        if self.head is None:
            for path in without_leading_out(self.folder.glob(f"{HEADS}/*/*"), self.location):
                copy_file(path, folder / path.relative_to(self.folder))
        if (self.folder / REPORT_NAME).is_file():
            report = load_report(self.folder)
            head = self.head or report.loaded_head
            notes = [*report.notes, *_dtype_notes(self.folder, folder)]
            is_changed, weights = report.changed or changed, hash_weights(folder)
            files = sorted({CARD, REPORT_NAME, *merged_files(folder)})
            saved = replace(report, changed=is_changed, loaded_head=head, notes=notes, weights=weights, files=files)
            saved.save(folder)

    @contextmanager
    def keeping_card(self) -> Iterator[None]:
        """Restore the card of a cached merge after the block, because a push writes one repository's name into it."""
        card = self.folder / CARD
        if self.folder.parent != self.cache or not card.is_file():  # the folder is the user's own
            yield
            return
        before = card.read_bytes()
        try:
            yield
        finally:
            write_file(card, before)


def settings_of(model: PreTrainedModel) -> list[str]:
    """The model's configuration and its generation configuration as JSON. The latter is empty if it has none."""
    generation_config = getattr(model, "generation_config", None)
    return [model.config.to_json_string(), generation_config.to_json_string() if generation_config else ""]


def _dtype_notes(source: Path, folder: Path) -> list[str]:
    """A note for the report if the weights in `folder` have another dtype than the merge in `source`."""
    configs = [load_json(each / "config.json") for each in (source, folder)]
    merged, saved = [config.get("dtype", config.get("torch_dtype")) for config in configs]
    if not merged or not saved or merged == saved:
        return []
    return [f"The weights were converted to {saved}; the merge has them in {merged}."]
