"""A loaded merge is saved as the merge that it is, and with every change that was made to it."""

import shutil

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from transformers import QuantoConfig
from transformers.quantizers import HfQuantizer

from families import Relatives
from neuromerge_hf import AutoMergedModel, merge
from neuromerge_hf.folder.report import load_report
from tiny_models import contents, load, logits, merged_folder


def test_an_unmodified_model_is_saved_by_copying_the_merge(load_merged, tmp_path):
    for arguments in ({}, {"head": None}):
        model = load_merged(**arguments)
        model.save_pretrained(tmp_path / "saved")
        assert contents(tmp_path / "saved") == contents(merged_folder(model))
        assert load_report(tmp_path / "saved") == load_report(merged_folder(model)).__class__(
            **{**vars(load_report(merged_folder(model))), "output_dir": tmp_path / "saved"}
        )
        assert (tmp_path / "saved" / "README.md").is_file()
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
        shutil.rmtree(tmp_path / "saved")


def test_a_model_that_was_trained_further_says_so(model, tmp_path):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(1, 13).view(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "trained")
    assert load_report(tmp_path / "trained").changed
    assert torch.equal(logits(load(tmp_path / "trained")), logits(model))
    assert contents(tmp_path / "trained").keys() == contents(merged_folder(model)).keys()
    before = (merged_folder(model) / "README.md").read_text()
    assert (tmp_path / "trained" / "README.md").read_text().splitlines() != before.splitlines()
    again = AutoMergedModel.from_pretrained(tmp_path / "trained")
    again.save_pretrained(tmp_path / "again")
    assert load_report(tmp_path / "again").changed, "it is not the merge, now or later"


@pytest.mark.parametrize("edit", ["one entry", "rows", "columns", "exchanged"])
def test_the_smallest_change_of_a_parameter_is_seen(model, tmp_path, edit):
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        if edit == "one entry":
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        elif edit == "rows":
            weight[0] *= 2
            weight[1] /= 2
        elif edit == "columns":
            weight[:, 0] *= 2
            weight[:, 2] /= 2
        else:
            weight.copy_(weight.flip(0))
    model.save_pretrained(tmp_path / "saved")
    assert load_report(tmp_path / "saved").changed


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama-tied", "lm_head.weight"),
        ("mixtral", "model.layers.1.mlp.experts.down_proj"),  # stored in pieces
        ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("resnet", "resnet.embedder.embedder.normalization.running_mean"),
        ("resnet", "resnet.embedder.embedder.normalization.num_batches_tracked"),
        ("bert", "pooler.dense.bias"),
    ],
)
def test_a_change_is_seen_in_whatever_form_the_files_store_it(tmp_path, family, name):
    relatives = Relatives(family, tmp_path)
    merge([relatives.full(0)], tmp_path / "merged", base_model=relatives.base)
    model = AutoMergedModel.from_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "merged")
    model.state_dict()[name].view(-1)[-1] += 1
    model.save_pretrained(tmp_path / "changed")
    assert load_report(tmp_path / "changed").changed
    again = AutoMergedModel.from_pretrained(tmp_path / "changed")
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])


def test_tied_weights_are_compared_each(tmp_path):
    relatives = Relatives("llama-tied", tmp_path)
    merge([relatives.full(0)], tmp_path / "merged", base_model=relatives.base)
    model = AutoMergedModel.from_pretrained(tmp_path / "merged")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(tmp_path / "saved")
    assert load_report(tmp_path / "saved").changed


def test_resized_embeddings_are_a_change(model, tmp_path):
    model.resize_token_embeddings(41, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    assert load_report(tmp_path / "saved").changed
    assert load(tmp_path / "saved").lm_head.weight.shape[0] == 41


def test_one_parameter_that_was_cast_is_no_change_but_saved_in_its_dtype(model, tmp_path):
    model.lm_head.half()
    model.save_pretrained(tmp_path / "saved")
    assert not load_report(tmp_path / "saved").changed
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), model.lm_head.weight)


def test_a_new_head_is_no_change_of_the_merge_but_a_change_of_its_backbone_is(models, cache, tmp_path):
    model = AutoMergedModel.from_pretrained(
        [models / "topics"],
        base_model=models / "encoder",
        merge_cache_dir=cache,
        auto_class=transformers.BertForTokenClassification,
        num_labels=2,
    )
    model.save_pretrained(tmp_path / "saved")
    assert not load_report(tmp_path / "saved").changed
    model.bert.embeddings.word_embeddings.weight.data += 1
    model.save_pretrained(tmp_path / "changed")
    assert load_report(tmp_path / "changed").changed


ADDED = {
    "value_head.weight": lambda model: model.add_module("value_head", torch.nn.Linear(32, 1)),
    "model.layers.0.self_attn.q_proj.lora_A": lambda model: model.model.layers[0].self_attn.q_proj.register_parameter(
        "lora_A", torch.nn.Parameter(torch.ones(4, 32))
    ),
    "model.steering": lambda model: model.model.register_buffer("steering", torch.arange(32.0)),
}
"""How a user adds a tensor to a model, by the name of the tensor."""


@pytest.mark.parametrize("name", ADDED)
def test_what_the_user_added_is_saved_and_pushed_and_is_no_change_of_the_merge(hub, load_merged, tmp_path, name):
    model = load_merged()
    ADDED[name](model)
    model.save_pretrained(tmp_path / "saved")
    repo_id = f"object/added-{name}"
    model.push_to_hub(repo_id)
    pushed = load_tensors(hub.files(repo_id)["model.safetensors"])
    for tensors in (load_file(tmp_path / "saved" / "model.safetensors"), pushed):
        assert torch.equal(tensors[name], model.state_dict()[name])
        assert set(model.state_dict()) == set(tensors)
    assert not load_report(tmp_path / "saved").changed


class RenamingQuantizer(HfQuantizer):
    """Keeps the weights of one layer under another name, as those of HQQ and Quanto do."""

    requires_calibration = False

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


def test_a_weight_that_a_quantiser_renamed_is_no_change_of_the_merge(load_merged, tmp_path):
    model = load_merged()
    layer = model.model.layers[0].mlp.up_proj
    layer.W_q = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    del layer.weight
    model.hf_quantizer = RenamingQuantizer(QuantoConfig())
    model.save_pretrained(tmp_path / "saved")
    assert "model.layers.0.mlp.up_proj.W_q" in load_file(tmp_path / "saved" / "model.safetensors")
    assert not load_report(tmp_path / "saved").changed
    model.hf_quantizer = None
    model.save_pretrained(tmp_path / "lacking")
    assert load_report(tmp_path / "lacking").changed


@pytest.mark.parametrize("part", ["bert.encoder.layer.0.output.dense.weight", "classifier.bias"])
def test_a_head_is_compared_with_the_one_that_was_put_on(load_merged, tmp_path, part):
    model = load_merged(head="moods")
    model.state_dict()[part].view(-1)[0] += 1
    model.save_pretrained(tmp_path / "saved")
    assert load_report(tmp_path / "saved").changed


def test_weights_that_are_passed_are_compared_instead_of_the_models_own(model, tmp_path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=weights)
    assert not load_report(tmp_path / "saved").changed
    weights["lm_head.weight"] += 1
    model.save_pretrained(tmp_path / "changed", state_dict=weights)
    assert load_report(tmp_path / "changed").changed


def test_a_merge_that_was_replaced_meanwhile_is_not_taken_for_the_model(models, tmp_path):
    for expert in ("math", "code"):
        merge([models / expert], tmp_path / "merged", base_model=models / "base", overwrite=True)
        if expert == "math":
            model = AutoMergedModel.from_pretrained(tmp_path / "merged")
            before = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), before)
    assert load_report(tmp_path / "saved").changed


def test_a_model_whose_merge_is_gone_is_saved_alone(models, tmp_path, caplog):
    merge([models / "math"], tmp_path / "merged", base_model=models / "base")
    model = AutoMergedModel.from_pretrained(tmp_path / "merged")
    (tmp_path / "merged").rename(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "saved")
    assert "is gone. The model is saved without its recipe" in caplog.text
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_a_model_of_its_class_that_is_no_merge_is_saved_as_any_other(model, tmp_path):
    other = type(model)(model.config).eval()
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(other))
    assert not (tmp_path / "saved" / "recipe.yaml").exists()


def test_a_cast_when_loading_is_no_change_but_saved_in_that_dtype(load_merged, tmp_path):
    model = load_merged(dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    assert not load_report(tmp_path / "saved").changed
    assert "converted to bfloat16; the merge has them in float32" in (tmp_path / "saved" / "README.md").read_text()
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_an_edited_configuration_is_saved_and_is_no_change(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "saved")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "saved").max_new_tokens == 7
    assert not load_report(tmp_path / "saved").changed


def test_shards_are_of_the_size_that_is_asked_for_and_replace_what_was_there(model, tmp_path):
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
        assert [path.name for path in (tmp_path / "saved").glob("model*")] == ["model.safetensors"]
        model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
        assert not (tmp_path / "saved" / "model.safetensors").exists()
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
        assert not load_report(tmp_path / "saved").changed


def test_a_model_with_a_head_is_saved_as_a_task_model(load_merged, tmp_path):
    model = load_merged(head="moods")
    model.save_pretrained(tmp_path / "saved")
    assert load_report(tmp_path / "saved").loaded_head == "moods"
    assert not load_report(tmp_path / "saved").changed
    assert not (tmp_path / "saved" / "heads").exists()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(plain), logits(model))


def test_an_adapter_that_was_added_is_saved_alone(model, tmp_path):
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "saved" / "merge_report.json").exists()


@pytest.mark.parametrize("changed", [False, True])
def test_a_model_is_saved_whole_or_not_at_all(load_merged, tmp_path, monkeypatch, changed):
    model = load_merged()
    if changed:
        next(model.parameters()).data.add_(1)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("neuromerge_hf.loading.merged_model.write_card", fail)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_is_a_merge_that_another_may_replace(load_merged, models, tmp_path):
    model = load_merged()
    next(model.parameters()).data.add_(1)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert set(load_report(tmp_path / "saved").files) == {path.name for path in (tmp_path / "saved").iterdir()}
    merge([models / "math"], tmp_path / "saved", base_model=models / "base", overwrite=True)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1
