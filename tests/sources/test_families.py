"""The invariant that settles whether a family can be merged, as a full checkpoint and as an adapter.

One untrimmed expert is given back: the merged model answers as the expert's own does, a full checkpoint loaded by
transformers, an adapter by PEFT and not merged. What is merged is always loaded by plain transformers, which must miss
nothing and find nothing that it does not know. Each card gets its picture, whatever the layers are called.

Merges of several experts are compared with the slow direct form in test_merge_families.py.
"""

from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

import make_families_table
from all_families import ALL_FAMILIES
from families import GIVES_BACK, TOKENS, Family, Relatives
from neuromerge_hf import MergeError, NeuroMergingConfig, merge, plan_merge

KINDS = ("full", "lora")


def largest_error(relatives: Relatives, kind: str, folder: Path) -> float:
    """How far the merge of one untrimmed expert is from the expert in what it answers."""
    expert = relatives.expert(kind, 1)
    merge([expert], folder, base_model=relatives.base, config=GIVES_BACK, device="cpu", threads=1)
    want = relatives.output(relatives.trained(expert, 1))
    assert (want - relatives.output(relatives.untrained(1))).abs().max() > 1e-2
    relatives.load_cleanly(folder)
    model = relatives.untrained(1, folder)
    head = folder / "heads" / expert.name / "head.safetensors"
    if head.exists():
        assert not model.load_state_dict(load_file(head), strict=False).unexpected_keys
    return float((relatives.output(model.eval()) - want).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_one_untrimmed_expert_is_given_back(name: str, kind: str, relatives_of, tmp_path: Path) -> None:
    assert largest_error(relatives_of(name), kind, tmp_path / "merged") < 1e-4


def test_matrices_whose_neurons_are_not_known_are_refused_unless_they_are_excluded(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)
    relatives = Relatives("xlnet", tmp_path, {"xlnet": Family(config, transformers.XLNetModel, TOKENS, {})})
    experts = [relatives.full(0)]
    with pytest.raises(
        MergeError, match=r"rel_attn\.k of .*base cannot be merged: k of XLNetRelativeAttention.*exclude="
    ):
        plan_merge(experts, base_model=relatives.base)
    config = NeuroMergingConfig(exclude=("*.rel_attn.?", "*.seg_embed"))
    plan = plan_merge(experts, base_model=relatives.base, config=config)
    assert "layer.0.ff.layer_1.weight" in plan.merged
    assert "layer.0.rel_attn.k" in plan.copied


def test_the_table_in_the_docs_is_what_these_tests_say() -> None:
    assert make_families_table.FILE.read_text() == make_families_table.render(), "run `make families`"
