"""What `AutoMergedModel` returns is its architecture's own model, and is saved and pushed as the merge that it is."""

import copy
import io
import pickle
import shlex
import shutil

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from transformers import QuantoConfig
from transformers.quantizers import HfQuantizer
from typer.testing import CliRunner

from families import Relatives
from neuromerge_hf import AutoMergedModel, MergeError, merge
from neuromerge_hf.cli import app
from neuromerge_hf.folder.report import load_report
from tiny_models import contents, disturb, load, logits, save_adapter, save_bert, save_fine_tune, save_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "math", seed=1)
    save_adapter(base, root / "code", seed=2)
    encoder = save_bert(root / "encoder")
    save_fine_tune(encoder, root / "topics", seed=3, model_class="BertForSequenceClassification", num_labels=3)
    save_fine_tune(encoder, root / "moods", seed=4, model_class="BertForSequenceClassification", num_labels=5)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load_merged(models, cache):
    """Loads a merge of two experts; of two classifiers if a head is asked for."""

    def from_pretrained(**arguments):
        names, base = (["math", "code"], "base") if "head" not in arguments else (["topics", "moods"], "encoder")
        experts = [models / name for name in names]
        return AutoMergedModel.from_pretrained(experts, base_model=models / base, cache_dir=cache, **arguments)

    return from_pretrained


@pytest.fixture
def model(load_merged):
    return load_merged()


def merged_folder(model):
    return model._origin.location.folder


def left_behind(cache) -> list[str]:
    return [path.name for path in (cache / "pushes").iterdir()] if (cache / "pushes").is_dir() else []


# --------------------------------------------------------------------------------------------- the architecture's own


def test_it_is_an_instance_of_the_architectures_own_class(model):
    plain = transformers.LlamaForCausalLM
    assert isinstance(model, plain)
    names = ("__name__", "__qualname__", "__module__", "__doc__")
    assert [getattr(type(model), name) for name in names] == [getattr(plain, name) for name in names]
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not model.is_custom_code()


def test_two_models_of_an_architecture_are_of_one_class(load_merged):
    assert type(load_merged()) is type(load_merged(dtype="bfloat16"))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_the_same_kind_of_object(hub, model, through):
    copied = through(model)
    assert type(copied) is type(model)
    assert torch.equal(logits(copied), logits(model))
    name = f"object/{through.__name__.replace('_', '-')}"
    copied.push_to_hub(name)
    pushed, made = hub.files(name), contents(merged_folder(model))
    assert pushed["model.safetensors"] == made["model.safetensors"]


def test_a_pickle_holds_no_token(models, cache):
    model = AutoMergedModel.from_pretrained([models / "code"], cache_dir=cache, token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(model)


def test_a_pickle_of_a_model_from_the_hub_holds_no_token(hub, model, cache):
    hub.add_folder("object/secret", merged_folder(model))
    loaded = AutoMergedModel.from_pretrained("object/secret", cache_dir=cache, token="hf_secret")
    assert b"object/secret" in pickle.dumps(loaded)
    assert b"hf_secret" not in pickle.dumps(loaded)


def test_peft_wraps_it_and_merges_into_it(model, tmp_path):
    before = logits(model)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(wrapped), before)
    disturb(wrapped, trainable_only=True)
    after = logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "adapter")
    assert {path.suffix for path in (tmp_path / "adapter").glob("*.safetensors")} == {".safetensors"}
    unwrapped = wrapped.merge_and_unload()
    assert torch.allclose(logits(unwrapped), after, atol=1e-5)
    unwrapped.save_pretrained(tmp_path / "unwrapped")
    assert load_report(tmp_path / "unwrapped").changed
    assert torch.equal(logits(load(tmp_path / "unwrapped")), logits(unwrapped))


def test_it_is_compiled_and_generates(model):
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
    prompt = torch.arange(4, 8).view(1, 4)
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > 4
    assert compiled._orig_mod is model


def test_layers_on_the_disk_are_saved_and_unchanged(load_merged, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load_merged(device_map=device_map, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load_merged()))
    assert not load_report(tmp_path / "saved").changed


# ---------------------------------------------------------------------------------------------------- saved to a folder


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
        cache_dir=cache,
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


# ---------------------------------------------------------------------------------------------------- pushed to the Hub


def test_an_unmodified_model_is_pushed_from_the_files_of_the_merge(hub, model, cache, monkeypatch):
    plain = transformers.LlamaForCausalLM
    monkeypatch.setattr(plain, "save_pretrained", None)  # it is not serialised again
    commit = model.push_to_hub("object/merged", commit_message="Mine", tags="tiny")
    assert commit.commit_message == "Mine"
    assert commit.oid == hub.repos["object/merged"].resolve("main")
    pushed = hub.files("object/merged")
    ours = contents(merged_folder(model))
    assert [name for name in ours if pushed[name] != ours[name]] == ["recipe.yaml"]
    assert {"merge", "tiny"} <= set(HfApi().model_info("object/merged").card_data.tags)
    assert not left_behind(cache)
    assert torch.equal(logits(plain.from_pretrained("object/merged")), logits(model))


def test_what_was_written_into_one_repositorys_card_does_not_get_into_another(hub, model):
    model.push_to_hub("object/one")
    card = hub.files("object/one")["README.md"] + b"\nOnly here.\n"
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="object/one")
    model.push_to_hub("object/one")
    model.push_to_hub("object/other")
    assert b"Only here." in hub.files("object/one")["README.md"]
    assert b"Only here." not in hub.files("object/other")["README.md"]


def test_the_usual_arguments_work(hub, model):
    model.push_to_hub("object/usual", private=True, revision="next", max_shard_size="20KB", token="hf_mine")
    assert hub.repos["object/usual"].private
    assert "model.safetensors.index.json" in hub.files("object/usual", "next")
    assert "model.safetensors" not in hub.files("object/usual")
    commit = model.push_to_hub("object/usual", create_pr=True, commit_description="Why")
    assert commit.pr_num == 1
    assert torch.equal(logits(load("object/usual", "LlamaForCausalLM", revision="refs/pr/1")), logits(model))


def test_a_changed_model_is_pushed_as_such_and_leaves_nothing_behind(hub, model, cache):
    disturb(model)
    model.push_to_hub("object/changed")
    assert torch.equal(logits(load("object/changed")), logits(model))
    assert b'"changed": true' in hub.files("object/changed")["merge_report.json"]
    assert not left_behind(cache)


def test_a_changed_model_whose_push_fails_stays_on_disk(hub, model, cache):
    disturb(model)
    hub.fail("POST .*/commit/", 403, "no")
    with pytest.raises(MergeError, match="The model is complete in") as caught:
        model.push_to_hub("object/kept")
    (name,) = left_behind(cache)
    folder = cache / "pushes" / name
    assert str(folder) in str(caught.value)
    assert torch.equal(logits(load(folder)), logits(model))
    hub.forget_traffic()
    command = shlex.split(str(caught.value).rpartition("\n")[2])
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert torch.equal(logits(load("object/kept")), logits(model))
    shutil.rmtree(folder)


def test_a_changed_model_that_cannot_be_saved_leaves_nothing_behind(hub, model, cache, monkeypatch):
    disturb(model)
    with pytest.raises(MergeError, match="is no id of a repository"):
        model.push_to_hub("not an id")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", lambda *_: shutil.copy("none", "where"))
    with pytest.raises(OSError, match="none"):
        model.push_to_hub("object/unsaved")
    assert not left_behind(cache)
    assert "object/unsaved" not in hub.repos


def test_saving_with_push_to_hub_pushes_the_folder_with_our_card(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "object", push_to_hub=True, repo_id="object/saved", commit_message="Mine")
    assert "neuromerg" in hub.files("object/saved")["README.md"].decode().lower()
    assert (tmp_path / "object" / "README.md").read_bytes() == hub.files("object/saved")["README.md"]
    model.save_pretrained(tmp_path / "by-its-name", push_to_hub=True)
    assert "recipe.yaml" in hub.files("user/by-its-name")


def test_a_model_with_a_head_is_pushed_as_a_task_model(hub, load_merged):
    model = load_merged(head="topics")
    model.push_to_hub("object/task")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained("object/task")
    assert torch.equal(logits(plain), logits(model))
    assert b'"loaded_head": "topics"' in hub.files("object/task")["merge_report.json"]
    assert not any(name.startswith("heads/") for name in hub.files("object/task"))


def test_a_merge_on_the_hub_is_loaded_and_pushed_elsewhere_with_its_heads(hub, models, tmp_path):
    merge([models / "topics", models / "moods"], tmp_path / "merged", base_model=models / "encoder")
    hub.add_folder("object/source", tmp_path / "merged")
    for source in ("object/source", tmp_path / "merged"):
        model = AutoMergedModel.from_pretrained(source)
        assert isinstance(model, transformers.BertModel)
        name = f"object/from-{'hub' if source == 'object/source' else 'folder'}"
        model.push_to_hub(name)
        made, pushed = contents(tmp_path / "merged"), hub.files(name)
        assert [path for path in made if pushed[path] != made[path]] == ["recipe.yaml"]
    assert "object/source" not in hub.files("object/from-folder")["README.md"].decode()


def test_an_adapter_of_a_merge_on_the_hub_names_it_and_no_folder(hub, models, tmp_path):
    merge([models / "topics"], tmp_path / "merged", base_model=models / "encoder")
    hub.add_folder("object/base", tmp_path / "merged")
    adapted = get_peft_model(AutoMergedModel.from_pretrained("object/base"), LoraConfig(target_modules=["query"]))
    assert adapted.peft_config["default"].base_model_name_or_path == "object/base"
