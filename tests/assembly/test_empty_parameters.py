"""Parameters that have no entries are written as they are, and disturb neither thresholds nor the merge."""

import pytest
import torch

from neuromerge_hf import NeuroMergingConfig, TIESConfig, merge
from tiny_models import load, save_bert, save_fine_tune


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("config", [NeuroMergingConfig(), NeuroMergingConfig(density=1.0), TIESConfig()], ids=str)
def test_a_model_with_parameters_that_have_no_entries_is_merged(config, tmp_path):
    base = save_bert(tmp_path / "base", intermediate_size=0, type_vocab_size=1)
    expert = save_fine_tune(base, tmp_path / "expert", seed=1)
    report = merge([expert], tmp_path / "merged", base_model=base, config=config)
    empty = {name for name, tensor in load(base).state_dict().items() if tensor.numel() == 0}
    assert len(empty) == 6
    assert empty == set(report.from_base.names)
    merged, origin = load(tmp_path / "merged").state_dict(), load(base).state_dict()
    assert all(merged[name].shape == tensor.shape for name, tensor in origin.items())
    assert not torch.equal(merged["embeddings.word_embeddings.weight"], origin["embeddings.word_embeddings.weight"])
