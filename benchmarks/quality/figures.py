"""The numbers that the benchmark measures, and the compressed JSON files that hold them."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from intervals import Difference
from methods import Setting

RESULTS = Path(__file__).parent / "results"
FIGURES = "quality.json.gz"
VALIDATION = "validation.json.gz"

Key = tuple[str, int, int, str]
"""The kind of the experts, the training seed, the number of tasks, and the name of the scored models.

The name is "base", "experts", a method's name for its default setting, or a method's name and " tuned".
"""


@dataclass
class Scores:
    """The accuracies on the test texts.

    Attributes:
        by_task: the accuracies in %, by task.
        chosen: the setting of each method with the best accuracy on the validation texts.
        differences: how much better NeuroIso's default is than another name's accuracy, by kind, number of tasks, and
            name.
    """

    by_task: dict[Key, dict[str, float]] = field(default_factory=dict)
    chosen: dict[Key, Setting] = field(default_factory=dict)
    differences: dict[tuple[str, int, str], Difference] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Any]:
        return self._distinct(0)

    @property
    def seeds(self) -> list[Any]:
        return self._distinct(1)

    @property
    def sizes(self) -> list[Any]:
        return self._distinct(2)

    @property
    def tasks(self) -> list[str]:
        """All tasks, in the order in which sets of tasks grow."""
        return max((list(accuracies) for accuracies in self.by_task.values()), key=len)

    def averages(self, kind: str, name: str, size: int | None = None) -> list[float]:
        """Return the average over the first `size` tasks for each seed that has one. The default is all tasks."""
        keys = [(kind, seed, size or len(self.tasks), name) for seed in self.seeds]
        return [mean(self.by_task[key].values()) for key in keys if key in self.by_task]

    def _distinct(self, position: int) -> list[Any]:
        """Return the values at one position of the keys, in the order of the scores."""
        return list(dict.fromkeys(key[position] for key in self.by_task))

    def save(self, path: Path) -> None:
        """Write the figures to a compressed JSON file."""
        content = {
            "test accuracy in % by task": [_key_fields(key) | accuracies for key, accuracies in self.by_task.items()],
            "differences in points": [
                {"experts": kind, "tasks": size, "method": name, "difference": [round(value, 3) for value in found]}
                for (kind, size, name), found in self.differences.items()
            ],
            "chosen on validation": [_key_fields(key) | asdict(setting) for key, setting in self.chosen.items()],
        }
        write_compressed(path, content)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read the figures that `save` wrote."""
        content = json.loads(gzip.decompress(path.read_bytes()))
        scores = cls()
        for row in content["test accuracy in % by task"]:
            key = _take_key(row)
            scores.by_task[key] = row
        for row in content["chosen on validation"]:
            key = _take_key(row)
            scores.chosen[key] = Setting(key[-1], **row)
        for row in content["differences in points"]:
            scores.differences[row["experts"], row["tasks"], row["method"]] = tuple(row["difference"])
        return scores


def write_compressed(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    """Write a compressed JSON file without a time stamp, so that the same content gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content, indent=1).encode(), mtime=0))


def _key_fields(key: Key) -> dict[str, Any]:
    return dict(zip(("experts", "seed", "tasks", "method"), key, strict=True))


def _take_key(row: dict[str, Any]) -> Key:
    """Remove the key's fields from a row of a file, and return the key."""
    return row.pop("experts"), row.pop("seed"), row.pop("tasks"), row.pop("method")
