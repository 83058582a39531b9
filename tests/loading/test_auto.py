"""`AutoMergedModel` gives a plain transformers model, and merges the same inputs only once."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertForSequenceClassification

from neuromerge_hf import AutoMergedModel, MergeError, NeuroIsoConfig, NeuroMergingConfig, merge
from rewriting import edit_unseen
from tiny_models import (
    contents,
    load,
    load_adapted,
    logits,
    save_adapter,
    save_bert,
    save_fine_tune,
    save_llama,
    save_llamas,
)

UNCHANGED = NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
"""With it, merging one expert gives that expert back."""


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return save_llamas(tmp_path_factory.mktemp("llamas"))


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """Encoders with heads of several sizes, on a base without one and on a base with another."""
    root = tmp_path_factory.mktemp("berts")
    base = save_bert(root / "base")
    classifier = save_bert(root / "classifier", "BertForSequenceClassification", num_labels=4)
    task = {"model_class": "BertForSequenceClassification"}
    tagging = {"model_class": "BertForTokenClassification"}
    save_fine_tune(base, root / "topics", seed=1, num_labels=3, **task)
    save_fine_tune(base, root / "moods", seed=2, num_labels=5, **task)
    save_fine_tune(base, root / "tags", seed=3, num_labels=6, **tagging)
    save_adapter(base, root / "spam", seed=4, num_labels=3, task_type="SEQ_CLS", **task)
    save_adapter(
        base, root / "names", seed=5, num_labels=7, task_type="TOKEN_CLS", target_modules=["query", "dense"], **tagging
    )
    save_fine_tune(classifier, root / "of-classifier", seed=6, num_labels=3, ignore_mismatched_sizes=True, **task)
    return root


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def merges(cache: Path) -> dict[str, tuple[int, int]]:
    """Every weight file of a cache, with what changes when it is written again."""
    return {
        path.relative_to(cache).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in cache.rglob("model.safetensors")
    }


# --------------------------------------------------------------------------------------------------- what is returned


def test_the_architectures_own_class_is_returned(llamas, cache):
    model = AutoMergedModel.from_pretrained(
        [llamas / "math", llamas / "code"], base_model=llamas / "base", merge_cache_dir=cache
    )
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not model.training
    assert not close(logits(model), logits(load(llamas / "base")))


def test_one_expert_unchanged_has_the_experts_logits(llamas, cache):
    merged = AutoMergedModel.from_pretrained(
        [llamas / "math"], base_model=llamas / "base", config=UNCHANGED, merge_cache_dir=cache
    )
    assert close(logits(merged), logits(load(llamas / "math")))
    merged = AutoMergedModel.from_pretrained([llamas / "code"], config=UNCHANGED, merge_cache_dir=cache)
    assert close(logits(merged), logits(load_adapted(llamas / "base", llamas / "code")))


def test_it_cannot_be_constructed():
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoMergedModel()


def test_arguments_go_to_from_pretrained(llamas, cache):
    model = AutoMergedModel.from_pretrained(
        [llamas / "code"], merge_cache_dir=cache, dtype="bfloat16", attn_implementation="eager", use_cache=False
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    model, info = AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_device_map_auto_places_the_model(llamas, cache):
    model = AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache, device_map="auto")
    assert {parameter.device.type for parameter in model.parameters()} == {PartialState().device.type}
    assert close(logits(model), logits(AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache)))


@pytest.mark.parametrize("head", [None, "topics"])
def test_layers_can_stay_on_the_disk(llamas, berts, cache, tmp_path, head):
    experts = [llamas / "math"] if head is None else [berts / "topics"]
    base = (llamas if head is None else berts) / "base"
    plain = AutoMergedModel.from_pretrained(experts, base_model=base, head=head, merge_cache_dir=cache)
    device_map = {name: "cpu" for name, _ in plain.named_children()}
    if head is None:
        device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    else:
        device_map |= {"bert": "cpu", "bert.encoder.layer.1": "disk"}
        device_map.pop("bert")
        device_map |= {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.pooler": "cpu"}
    model = AutoMergedModel.from_pretrained(
        experts, base_model=base, head=head, merge_cache_dir=cache, device_map=device_map, offload_folder=tmp_path
    )
    assert set(map(str, model.hf_device_map.values())) == {"cpu", "disk"}
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert close(logits(model), logits(plain))


def test_max_memory_sends_the_rest_to_the_disk(llamas, cache, tmp_path):
    arguments = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": tmp_path}
    model = AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache, **arguments)
    assert "disk" in model.hf_device_map.values()
    assert close(logits(model), logits(AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache)))


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, BertForSequenceClassification])
def test_auto_class_is_an_auto_class_or_a_model_class(berts, cache, auto_class):
    experts = [berts / "topics", berts / "moods"]
    arguments = {"base_model": berts / "base", "merge_cache_dir": cache, "auto_class": auto_class}
    model = AutoMergedModel.from_pretrained(experts, head="moods", **arguments)
    assert isinstance(model, BertForSequenceClassification)
    assert model.config.num_labels == 5
    with_a_new_head = AutoMergedModel.from_pretrained(experts, num_labels=2, **arguments)
    assert logits(with_a_new_head).shape == (2, 2)


def test_what_is_no_class_of_transformers_is_refused(llamas, cache):
    for wrong in ("LlamaForCausalLM", torch.nn.Linear):
        with pytest.raises(MergeError, match="auto_class must be an Auto class or a model class of transformers, not"):
            AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache, auto_class=wrong)


# ------------------------------------------------------------------------------------------------------------- cache


def test_the_second_call_finds_the_merge(llamas, tmp_path):
    experts, base = [llamas / "math", llamas / "code"], llamas / "base"
    first = AutoMergedModel.from_pretrained(experts, base_model=base, merge_cache_dir=tmp_path)
    made = merges(tmp_path)
    assert len(made) == 1
    for arguments in ({"base_model": base}, {"base_model": str(base), "config": NeuroIsoConfig()}, {}):
        again = AutoMergedModel.from_pretrained(experts, merge_cache_dir=tmp_path, dtype="float32", **arguments)
        assert torch.equal(logits(first), logits(again))
    assert merges(tmp_path) == made
    assert list(tmp_path.glob(".*")) == []


def test_changed_inputs_make_another_merge(llamas, tmp_path):
    base, math, code = (shutil.copytree(llamas / name, tmp_path / name) for name in ("base", "math", "code"))
    adapter_config = (code / "adapter_config.json").read_text()
    (code / "adapter_config.json").write_text(adapter_config.replace(str(llamas / "base"), str(base)))
    cache = tmp_path / "cache"

    def count(*experts, **arguments):
        AutoMergedModel.from_pretrained(experts, merge_cache_dir=cache, **arguments)
        return len(merges(cache))

    assert count(math, code, base_model=base) == 1
    assert count(code, math, base_model=base) == 2
    assert count(code) == 3
    assert count(code, config=NeuroMergingConfig(density=0.5)) == 4
    assert count(code, config=NeuroMergingConfig(exclude=("lm_head*",))) == 5
    weights = math / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000))
    assert count(math, code, base_model=base) == 6
    edit_unseen(weights)
    assert count(math, code, base_model=base) == 7
    save_llama(base, seed=8)  # found from the adapter, and changed
    assert count(code) == 8
    assert count(code) == 8


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(("head", "width"), [("topics", 3), ("moods", 5), ("tags", 6)])
def test_a_full_fine_tunes_head_stands_on_the_merged_backbone(berts, cache, head, width):
    experts = [berts / "topics", berts / "moods", berts / "tags"]
    merged = AutoMergedModel.from_pretrained(experts, base_model=berts / "base", head=head, merge_cache_dir=cache)
    expert = load(berts / head)
    assert isinstance(merged, type(expert))
    assert logits(merged).shape[-1] == width
    assert torch.equal(merged.classifier.weight, expert.classifier.weight)
    assert not torch.equal(merged.bert.embeddings.word_embeddings.weight, expert.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("head", ["topics", "moods", "tags"])
def test_one_fine_tune_unchanged_is_the_fine_tune_with_its_head(berts, cache, head):
    arguments = {"base_model": berts / "base", "config": UNCHANGED, "merge_cache_dir": cache}
    merged = AutoMergedModel.from_pretrained([berts / head], head=head, **arguments)
    assert close(logits(merged), logits(load(berts / head)))


@pytest.mark.parametrize(("head", "labels", "task"), [("spam", 3, "Sequence"), ("names", 7, "Token")])
def test_one_adapter_unchanged_is_the_adapted_model_with_its_head(berts, cache, head, labels, task):
    merged = AutoMergedModel.from_pretrained([berts / head], head=head, config=UNCHANGED, merge_cache_dir=cache)
    expert = load_adapted(berts / "base", berts / head, f"BertFor{task}Classification", num_labels=labels)
    assert type(merged).__name__ == f"BertFor{task}Classification"
    assert close(logits(merged), logits(expert))


def test_adapters_and_fine_tunes_keep_their_heads_side_by_side(berts, cache):
    experts = [berts / name for name in ("topics", "spam", "names")]
    for name, width in {"topics": 3, "spam": 3, "names": 7}.items():
        merged = AutoMergedModel.from_pretrained(experts, base_model=berts / "base", head=name, merge_cache_dir=cache)
        assert logits(merged).shape[-1] == width


def test_a_head_takes_the_place_of_the_bases_own(berts, cache):
    base, expert = berts / "classifier", berts / "of-classifier"
    arguments = {"base_model": base, "config": UNCHANGED, "merge_cache_dir": cache}
    assert close(
        logits(AutoMergedModel.from_pretrained([expert], head="of-classifier", **arguments)), logits(load(expert))
    )
    without = AutoMergedModel.from_pretrained([expert], **arguments)
    assert torch.equal(without.classifier.weight, load(base).classifier.weight)


def test_a_sharded_merge_takes_a_head(berts, cache, tmp_path):
    experts = [berts / "topics", berts / "moods"]
    merge(experts, tmp_path / "merged", base_model=berts / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    model = AutoMergedModel.from_pretrained(tmp_path / "merged", head="moods", merge_cache_dir=cache)
    same = AutoMergedModel.from_pretrained(experts, base_model=berts / "base", head="moods", merge_cache_dir=cache)
    assert torch.equal(logits(model), logits(same))


def test_an_unknown_head_is_refused_with_the_heads_that_there_are(berts, llamas, cache):
    with pytest.raises(MergeError, match=r"head='mods' names no expert with a head.*There are: moods, topics\."):
        AutoMergedModel.from_pretrained(
            [berts / "topics", berts / "moods"], base_model=berts / "base", head="mods", merge_cache_dir=cache
        )
    with pytest.raises(MergeError, match=r"head='code'.*No expert of this merge has one"):
        AutoMergedModel.from_pretrained([llamas / "code"], head="code", merge_cache_dir=cache)
    for outside in ("..", "", ".", "topics/../moods"):
        with pytest.raises(MergeError, match="names no expert"):
            AutoMergedModel.from_pretrained([berts / "spam"], head=outside, merge_cache_dir=cache)


# ------------------------------------------------------------------------------------------------- a merged model again


def test_a_merged_folder_is_loaded(berts, cache, tmp_path):
    merge([berts / "topics"], tmp_path / "merged", base_model=berts / "base", config=UNCHANGED)
    before = contents(tmp_path / "merged")
    model = AutoMergedModel.from_pretrained(tmp_path / "merged", merge_cache_dir=cache)
    assert isinstance(model, transformers.BertModel)
    model = AutoMergedModel.from_pretrained(str(tmp_path / "merged"), head="topics", merge_cache_dir=cache)
    assert close(logits(model), logits(load(berts / "topics")))
    assert contents(tmp_path / "merged") == before


def test_a_merged_folder_that_was_replaced_is_loaded_anew(berts, cache, tmp_path):
    for config in (UNCHANGED, NeuroMergingConfig()):
        merge([berts / "topics"], tmp_path / "merged", base_model=berts / "base", config=config, overwrite=True)
        model = AutoMergedModel.from_pretrained(tmp_path / "merged", head="topics", merge_cache_dir=cache)
        is_the_expert = close(logits(model), logits(load(berts / "topics")))
        assert is_the_expert == (config == UNCHANGED)


def test_a_merged_model_on_the_hub_is_loaded_with_the_head_that_is_asked_for(hub, berts, cache, tmp_path):
    merge([berts / "topics", berts / "moods"], tmp_path / "merged", base_model=berts / "base")
    hub.add_folder("auto/merged", tmp_path / "merged")
    local = AutoMergedModel.from_pretrained(tmp_path / "merged", head="moods", merge_cache_dir=cache)
    hub.forget_traffic()
    model = AutoMergedModel.from_pretrained("auto/merged", head="moods", merge_cache_dir=cache)
    assert torch.equal(logits(model), logits(local))
    assert hub.bytes_served["auto/merged/heads/moods/head.safetensors"]
    assert not hub.bytes_served["auto/merged/heads/topics/head.safetensors"]
    with pytest.raises(MergeError, match=r"There are: moods, topics\."):
        AutoMergedModel.from_pretrained("auto/merged", head="mods", merge_cache_dir=cache)
    plain = transformers.AutoModel.from_pretrained("auto/merged")
    assert torch.equal(logits(plain), logits(AutoMergedModel.from_pretrained("auto/merged", merge_cache_dir=cache)))


def test_a_revision_of_a_merged_model_is_loaded(hub, llamas, cache, tmp_path):
    for name, density in {"main": 1.0, "sparse": 0.1}.items():
        merge([llamas / "code"], tmp_path / name, config=NeuroMergingConfig(density=density))
        hub.add_folder("auto/revisions", tmp_path / name, revision=name)
    main, sparse = (load(tmp_path / name) for name in ("main", "sparse"))
    for arguments, expected in (
        (("auto/revisions", {}), main),
        (("auto/revisions@sparse", {}), sparse),
        (("auto/revisions", {"revision": "sparse"}), sparse),
    ):
        model = AutoMergedModel.from_pretrained(arguments[0], merge_cache_dir=cache, **arguments[1])
        assert torch.equal(logits(model), logits(expected))
    with pytest.raises(MergeError, match="id@sparse"):
        AutoMergedModel.from_pretrained([llamas / "code"], revision="sparse", merge_cache_dir=cache)


def test_a_model_that_is_not_merged_is_refused(llamas, cache):
    with pytest.raises(MergeError, match=r"is not a merged model\. Give the experts as a list"):
        AutoMergedModel.from_pretrained(llamas / "math", merge_cache_dir=cache)


@pytest.mark.parametrize("option", [{"overwrite": True}, {"max_shard_size": "1GB"}, {"tuned_on": "texts"}])
def test_an_option_of_the_written_folder_is_refused_before_merging(option, llamas, tmp_path):
    (name,) = option
    with pytest.raises(TypeError, match=f"from_pretrained has no argument '{name}': it is one of `merge`"):
        AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=tmp_path / "cache", **option)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"base_model": "base"},
        {"config": UNCHANGED},
        {"tokenizer": "union"},
        {"merge_heads": True},
        {"device": "cpu"},
        {"threads": 2},
        {"overwrite": True},
        {"max_shard_size": "1GB"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_of_a_merge_is_refused_for_one_model_that_is_merged_already(option, tmp_path):
    with pytest.raises(TypeError) as caught:
        AutoMergedModel.from_pretrained(tmp_path / "merged", **option)
    (name,) = option
    assert str(caught.value) == (
        f"{name}= is an option of a merge, but {tmp_path / 'merged'} is one model, which must be merged already. "
        f"Leave {name}= out, or give the experts as a list."
    )


def test_transformers_own_configuration_is_that_of_a_merged_model(llamas, cache, tmp_path):
    merge([llamas / "code"], tmp_path / "merged")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged", attention_dropout=0.5)
    for given in (config, None):
        model = AutoMergedModel.from_pretrained(
            tmp_path / "merged", config=given, base_model=None, dtype="bfloat16", token=False, merge_cache_dir=cache
        )
        assert model.config.attention_dropout == (0.5 if given else 0)
        assert model.dtype == torch.bfloat16


def test_a_saved_model_is_reloaded_by_plain_transformers(berts, llamas, cache, tmp_path):
    model = AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    model = AutoMergedModel.from_pretrained([berts / "spam"], head="spam", merge_cache_dir=cache)
    model.save_pretrained(tmp_path / "with-head")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "with-head")
    assert torch.equal(logits(again), logits(model))
    assert "neuromerge" not in (tmp_path / "with-head" / "config.json").read_text()


def test_the_model_pushes_itself_to_the_hub(hub, llamas, cache):
    model = AutoMergedModel.from_pretrained([llamas / "code"], merge_cache_dir=cache)
    model.push_to_hub("auto/pushed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("auto/pushed")), logits(model))
