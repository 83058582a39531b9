"""What cannot be merged is refused with one clear error, before any heavy work, and nothing is left behind."""

import errno
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuromerge_hf import MergeError, NeuroMergingConfig, merge, plan_merge
from tiny_models import contents, load, save_adapter, save_bert, save_fine_tune, save_llama, seeded

EMBEDDINGS = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, fine-tunes and adapters of it. Tests that damage one take a copy."""
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "math", seed=1)
    save_fine_tune(base, root / "sharded", seed=2, shard="20KB")
    save_adapter(base, root / "code", seed=3)
    save_bert(root / "bert")
    with seeded(4):
        torch.save(load(root / "math").state_dict(), root / "state.bin")
    return root


@pytest.fixture
def copied(models, tmp_path):
    """Copy one of the models, to be damaged."""

    def copy(name: str, to: str | None = None) -> Path:
        return Path(shutil.copytree(models / name, tmp_path / (to or name)))

    return copy


@pytest.fixture
def pickled(copied):
    """A fine-tune in a .bin file."""

    def make(state: object, name: str = "pickled") -> Path:
        folder = copied("math", name)
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        return folder

    return make


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "workspace").mkdir()
    return tmp_path / "workspace"


@pytest.fixture
def refused(workspace):
    """Merge, expect one `MergeError`, check that nothing is left, and return the message."""

    def refuse(experts, *, planned: bool = True, **kwargs) -> str:
        with pytest.raises(MergeError) as caught:
            merge(experts, workspace / "made" / "merged", **kwargs)
        assert list(workspace.iterdir()) == []
        if planned:  # from the metadata alone
            with pytest.raises(MergeError) as expected:
                plan_merge(experts, **{key: value for key, value in kwargs.items() if key != "overwrite"})
            assert str(expected.value) == str(caught.value)
        return str(caught.value)

    return refuse


def says(message: str, *parts: object) -> bool:
    missing = [part for part in map(str, parts) if part not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "Traceback" not in message
    return True


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------ architectures and shapes


def test_another_model_type_is_refused(models, refused):
    message = refused([models / "bert"], base_model=models / "base")
    assert says(message, models / "bert", "bert model", models / "base", "llama model")


def test_another_number_of_layers_is_refused(models, tmp_path, refused):
    deeper = save_llama(tmp_path / "deeper", num_hidden_layers=3)
    message = refused([deeper], base_model=models / "base")
    assert says(message, "architectures differ", deeper, models / "base", "model.layers.2.", "base_model")
    message = refused([models / "math"], base_model=deeper)
    assert says(message, "architectures differ", models / "math", deeper, "model.layers.2.")


def test_another_hidden_size_is_refused(models, tmp_path, refused):
    wider = save_llama(tmp_path / "wider", hidden_size=64)
    message = refused([wider], base_model=models / "base")
    assert says(message, "architectures differ", wider, models / "base", "64", "32", "base_model")


def test_shapes_that_contradict_the_configuration_are_refused_with_both_files(models, copied, refused):
    def widen(tensors):
        tensors[DOWN] = torch.zeros(32, 50)

    expert = copied("math")
    change_tensors(expert / "model.safetensors", widen)
    message = refused([expert], base_model=models / "base")
    assert says(message, DOWN, "(32, 50)", "(32, 48)", expert / "model.safetensors")
    assert says(message, models / "base" / "model.safetensors", "base_model")


def test_another_vocabulary_size_is_refused(models, tmp_path, refused):
    with seeded(0):
        model = load(models / "base")
        model.resize_token_embeddings(44, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    message = refused([tmp_path / "resized"], base_model=models / "base")
    assert says(message, "vocabularies differ", EMBEDDINGS, "(44, 32)", "(40, 32)", "resize_token_embeddings")
    assert says(message, tmp_path / "resized", models / "base")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_with_another_vocabulary_size_is_refused(models, tmp_path, refused):
    with seeded(0):
        model = load(models / "base")
        model.resize_token_embeddings(44, mean_resizing=False)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    message = refused([tmp_path / "resized"], base_model=models / "base")
    assert says(message, "vocabularies differ", EMBEDDINGS, "(44, 32)", "(40, 32)", "resize_token_embeddings")
    assert says(message, tmp_path / "resized" / "adapter_model.safetensors", models / "base")


def test_an_adapter_of_another_size_is_refused(models, tmp_path, refused):
    wider = save_llama(tmp_path / "wider", hidden_size=64)
    adapter = save_adapter(wider, tmp_path / "adapter", seed=1, target_modules=["q_proj"])
    message = refused([adapter], base_model=models / "base")
    assert says(message, "q_proj", "(4, 64)", "(32, 32)", adapter / "adapter_model.safetensors", "base_model")


def test_an_adapter_of_other_modules_is_refused(models, tmp_path, refused):
    adapter = save_adapter(models / "bert", tmp_path / "adapter", seed=1, target_modules=["query"])
    message = refused([adapter], base_model=models / "base")
    assert says(message, adapter, "query", "does not have", models / "base", "base_model")


# ------------------------------------------------------------------------------------------------------------ bases


def test_without_a_base_it_says_how_to_name_one(models, refused):
    message = refused([models / "math", models / "sharded"])
    assert says(message, "No base model", "base_model=", "--base-model")


def test_adapters_of_different_bases_are_refused(models, tmp_path, refused):
    other = save_llama(tmp_path / "other", seed=9)
    adapter = save_adapter(other, tmp_path / "adapter", seed=1)
    message = refused([models / "code", adapter])
    assert says(message, "different bases", models / "code", models / "base", adapter, other, "base_model=")


def test_an_adapter_whose_base_is_gone_says_which_base_it_names(models, copied, refused):
    adapter = copied("code")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="/gone/base")
    assert says(refused([adapter]), adapter, "/gone/base", "base_model=")


def test_a_base_that_is_an_adapter_is_refused(models, refused):
    message = refused([models / "math"], base_model=models / "code")
    assert says(message, models / "code", "adapter")


# ----------------------------------------------------------------------------------------------------------- adapters


def test_a_broken_adapter_configuration_is_refused(models, copied, refused):
    adapter = copied("code")
    (adapter / "adapter_config.json").write_text("{")
    assert says(refused([adapter], base_model=models / "base"), adapter / "adapter_config.json")


# ------------------------------------------------------------------------------------------------------------- files


def test_a_missing_weight_file_is_refused(models, copied, refused):
    expert, adapter, base = copied("math"), copied("code"), copied("base")
    (expert / "model.safetensors").unlink()
    message = refused([expert], base_model=models / "base")
    assert says(message, expert, "no weights", "model.safetensors", "pytorch_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert says(refused([adapter], base_model=models / "base"), adapter, "no weights", "adapter_model.safetensors")
    (base / "model.safetensors").unlink()
    assert says(refused([models / "math"], base_model=base), base, "no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["math/model.safetensors", "code/adapter_model.safetensors"])
@pytest.mark.parametrize("size", [4, 100, -5], ids=["length", "header", "body"])
def test_a_truncated_safetensors_file_is_refused(models, copied, refused, name, size):
    file = copied(name.partition("/")[0]) / Path(name).name
    os.truncate(file, size if size > 0 else file.stat().st_size + size)
    message = refused([file.parent], base_model=models / "base")
    assert says(message, file, "truncated", f"{file.stat().st_size} bytes", "again")


def test_a_file_that_only_claims_to_be_safetensors_is_refused(models, copied, refused):
    expert = copied("math")
    for content in (b"", b"<!DOCTYPE html>" * 9, (2).to_bytes(8, "little") + b"[]"):
        (expert / "model.safetensors").write_bytes(content)
        assert says(refused([expert], base_model=models / "base"), expert / "model.safetensors", "again")


def test_a_truncated_bin_file_is_refused(models, pickled, refused):
    expert = pickled(load(models / "math").state_dict())
    merge([expert], expert.parent / "fine", base_model=models / "base")
    file = expert / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size - 100)
    assert says(refused([expert], base_model=models / "base"), file, "again")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_pickle_that_holds_code_is_refused_and_not_run(models, pickled, refused, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    expert = pickled(load(models / "math").state_dict() | {"extra": Malicious()})
    message = refused([expert], base_model=models / "base")
    assert says(message, expert / "pytorch_model.bin", "weights_only", "safetensors")
    (expert / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Malicious()}))
    assert says(refused([expert], base_model=models / "base"), expert / "pytorch_model.bin", "weights_only")
    assert not (tmp_path / "executed").exists()


def test_a_bin_file_that_is_no_state_dict_is_refused(models, pickled, refused):
    expert = pickled([torch.zeros(3)])
    assert says(refused([expert], base_model=models / "base"), expert / "pytorch_model.bin", "state dict")


def test_a_missing_shard_is_refused(models, copied, refused):
    expert = copied("sharded")
    shard = sorted(expert.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refused([expert], base_model=models / "base")
    assert says(message, shard, "missing", "model.safetensors.index.json", "again")


@pytest.mark.parametrize("outside", ["../math/model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(models, copied, refused, outside):
    copied("math")
    expert = copied("sharded")
    index = expert / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weight_map | {DOWN: outside})
    assert says(refused([expert], base_model=models / "base"), index, repr(outside), "outside its folder")


def test_a_tensor_that_an_index_lists_and_no_file_holds_is_refused(models, copied, refused):
    expert = copied("sharded")
    index = json.loads((expert / "model.safetensors.index.json").read_text())
    change_tensors(expert / index["weight_map"][DOWN], lambda tensors: tensors.pop(DOWN))
    message = refused([expert], base_model=models / "base")
    assert says(message, expert / "model.safetensors.index.json", DOWN, "again")


def test_a_broken_index_is_refused(models, copied, refused):
    expert = copied("sharded")
    for content in ("{", "[]", "{}", '{"weight_map": {"a": 3}}'):
        (expert / "model.safetensors.index.json").write_text(content)
        assert says(refused([expert], base_model=models / "base"), expert / "model.safetensors.index.json", "index")


def test_a_missing_parameter_is_refused(models, copied, refused):
    expert, base = copied("math"), copied("base")
    change_tensors(expert / "model.safetensors", lambda tensors: tensors.pop(DOWN))
    message = refused([expert], base_model=models / "base")
    assert says(message, expert, DOWN, "LlamaForCausalLM", expert / "model.safetensors")
    change_tensors(base / "model.safetensors", lambda tensors: tensors.pop(DOWN))
    message = refused([models / "math"], base_model=base)
    assert says(message, base, DOWN, "LlamaForCausalLM", base / "model.safetensors")


def test_half_an_adapter_is_refused(models, copied, refused):
    adapter = copied("code")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    change_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(key))
    message = refused([adapter], base_model=models / "base")
    assert says(message, adapter / "adapter_model.safetensors", "lora_A", "model.layers.0.self_attn.q_proj")


def test_a_missing_or_broken_configuration_is_refused(models, copied, refused):
    expert = copied("math")
    (expert / "config.json").write_text("{")
    assert says(refused([expert], base_model=models / "base"), expert / "config.json", "cannot be read")
    (expert / "config.json").unlink()
    assert says(refused([expert], base_model=models / "base"), expert, "config.json", "adapter_config.json")


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("who", ["base", "math"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(models, copied, refused, who, value, density):
    def damage(tensors):
        tensors[DOWN][3, 5] = value

    folder = copied(who)
    change_tensors(folder / "model.safetensors", damage)
    base = folder if who == "base" else models / "base"
    expert = folder if who == "math" else models / "math"
    config = NeuroMergingConfig(density=density)
    message = refused([models / "code", expert], planned=False, base_model=base, config=config)
    assert says(message, DOWN, "NaN or an infinity", folder / "model.safetensors")
    assert says(message, "base" if who == "base" else "math")


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_lora_factor_that_is_not_finite_is_named_with_its_file(models, copied, refused, side):
    def damage(tensors):
        tensors[f"base_model.model.model.layers.1.mlp.down_proj.{side}.weight"][1, 2] = float("nan")

    adapter = copied("code")
    change_tensors(adapter / "adapter_model.safetensors", damage)
    message = refused([adapter], base_model=models / "base", planned=False)
    assert says(message, "model.layers.1.mlp.down_proj", "NaN or an infinity", adapter / "adapter_model.safetensors")


def test_a_quantised_model_is_refused(models, copied, refused):
    expert = copied("math")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_json(expert / "config.json", quantization_config=quantization)
    message = refused([expert], base_model=models / "base")
    assert says(message, expert, "quantised", "bitsandbytes", "float32, float16 or bfloat16")


def test_integer_weights_are_refused(models, copied, refused):
    def quantise(tensors):
        tensors[DOWN] = tensors[DOWN].to(torch.int8)

    expert = copied("math")
    change_tensors(expert / "model.safetensors", quantise)
    message = refused([expert], base_model=models / "base")
    assert says(message, DOWN, "int8", "float32", expert / "model.safetensors", models / "base", "Quantised")


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("experts", [[], (), "math", Path("math"), None], ids=repr)
def test_models_must_be_a_list(models, refused, experts):
    message = refused(experts, base_model=models / "base")
    assert says(message, "models must be a list of at least one", repr(experts))


def test_a_folder_that_does_not_exist_is_refused(models, refused):
    for missing in ("./missing", "/missing/model", "~/missing/model", "a//b", "a/../b"):
        assert says(refused([missing], base_model=models / "base"), missing, "not a folder")
        assert says(refused([models / "math"], base_model=missing), missing, "not a folder")
    message = refused(["a/b/c"], base_model=models / "base")
    assert says(message, "a/b/c", "neither a folder on this machine", "nor a model on the Hub")


def test_a_file_in_place_of_a_folder_is_refused(models, refused):
    file = models / "math" / "model.safetensors"
    assert says(refused([file], base_model=models / "base"), file, "is a file", "folder", "config.json")


def test_an_empty_folder_is_refused(models, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    message = refused([tmp_path / "empty"], base_model=models / "base")
    assert says(message, tmp_path / "empty", "config.json", "adapter_config.json")


def test_an_id_that_the_hub_does_not_have_is_refused(hub, models, refused):
    message = refused(["nobody/nothing"], base_model=models / "base")
    assert says(message, "nobody/nothing", "neither a folder", "nor a model on the Hub", "spelling", "token")
    message = refused([models / "math"], base_model="nobody/base")
    assert says(message, "nobody/base", "neither a folder", "nor a model on the Hub")


def test_an_id_that_cannot_be_one_is_refused(models, refused):
    assert says(refused(["what is this?"], base_model=models / "base"), "what is this?", "valid id on the Hub")


def test_a_revision_that_the_hub_does_not_have_is_refused(hub, models, refused):
    hub.add_folder("bad/revision", models / "math")
    message = refused(["bad/revision@v7"], base_model=models / "base")
    assert says(message, "bad/revision", "exists on the Hub", "'v7'")


def test_a_gated_model_is_refused_with_the_way_in(hub, models, refused):
    hub.add_folder("bad/gated", models / "math", gated=True)
    message = refused(["bad/gated"], base_model=models / "base")
    assert says(message, "bad/gated is gated", "terms", "hf auth login", "token=")


def test_no_weights_are_downloaded_for_what_metadata_refuses(hub, models, refused):
    hub.add_folder("bad/bert", models / "bert")
    hub.add_folder("bad/llama", models / "base")
    hub.forget_traffic()
    assert says(refused(["bad/bert"], base_model="bad/llama"), "bad/bert", "bad/llama")
    weights = {name: count for name, count in hub.bytes_served.items() if name.endswith(".safetensors")}
    assert set(weights) == {"bad/llama/model.safetensors"}
    assert weights["bad/llama/model.safetensors"] < (models / "base" / "model.safetensors").stat().st_size / 10


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 2, 1.01, float("nan"), float("inf"), "x", "0.2", None, True, [0.2]])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(MergeError) as caught:
        NeuroMergingConfig(density=density)
    assert says(str(caught.value), "0 < density <= 1", repr(density))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None, True])
@pytest.mark.parametrize("name", ["lambda_parallel", "lambda_orthogonal"])
def test_a_lambda_that_is_no_number_is_refused(name, value):
    with pytest.raises(MergeError) as caught:
        NeuroMergingConfig(**{name: value})
    assert says(str(caught.value), name, "finite number", repr(value))


@pytest.mark.parametrize("exclude", ["lm_head*", [3], None, 3], ids=repr)
def test_exclude_must_be_a_sequence_of_patterns(exclude):
    with pytest.raises(MergeError) as caught:
        NeuroMergingConfig(exclude=exclude)
    assert says(str(caught.value), "exclude", "patterns", repr(exclude))


def test_a_pattern_that_matches_nothing_is_refused(models, refused):
    config = NeuroMergingConfig(exclude=("lm_head*", "decoder.*"))
    message = refused([models / "math"], base_model=models / "base", config=config)
    assert says(message, "decoder.*", "matches no parameter", models / "base", "lm_head.weight")


def test_excluding_everything_is_refused(models, refused):
    message = refused([models / "math"], base_model=models / "base", config=NeuroMergingConfig(exclude=("*",)))
    assert says(message, "nothing to merge")


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int64, "nn", None, 3], ids=repr)
def test_a_dtype_that_is_no_floating_point_is_refused(models, refused, dtype):
    message = refused([models / "math"], base_model=models / "base", dtype=dtype)
    assert says(message, "dtype must be", '"bfloat16"', repr(dtype))


@pytest.mark.parametrize("size", ["5 apples", "GB", -1, 0, None], ids=repr)
def test_a_shard_size_that_is_none_is_refused(models, refused, size):
    message = refused([models / "math"], planned=False, base_model=models / "base", max_shard_size=size)
    assert says(message, "max_shard_size", repr(size), "5GB")


@pytest.mark.parametrize("device", ["tpu-ish", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(models, refused, device):
    message = refused([models / "math"], planned=False, base_model=models / "base", device=device)
    assert says(message, "device", device)


# ------------------------------------------------------------------------------------------------------------- output


def test_an_output_directory_with_content_is_refused_and_untouched(models, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], tmp_path / "merged", base_model=models / "base")
    assert says(str(caught.value), tmp_path / "merged", "not empty", "overwrite=True", "--overwrite")
    assert contents(tmp_path) == {"merged/notes.txt": b"mine"}


def test_an_output_that_is_a_file_is_refused(models, tmp_path):
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], tmp_path / "merged", base_model=models / "base", overwrite=True)
    assert says(str(caught.value), tmp_path / "merged", "is a file")
    assert contents(tmp_path) == {"merged": b"mine"}


@pytest.mark.parametrize("output", ["base", "math", "base/../math", "."])
def test_an_output_that_would_replace_an_input_is_refused(copied, tmp_path, output):
    base, expert = copied("base"), copied("math")
    before = contents(tmp_path)
    with pytest.raises(MergeError) as caught:
        merge([expert], tmp_path / output, base_model=base, overwrite=True)
    assert says(str(caught.value), "output directory", tmp_path / output)
    assert contents(tmp_path) == before


def test_an_empty_output_directory_is_used(models, workspace):
    (workspace / "merged").mkdir()
    merge([models / "math"], workspace / "merged", base_model=models / "base")
    assert [path.name for path in workspace.iterdir()] == ["merged"]
    load(workspace / "merged")


def test_the_current_directory_is_used_if_it_is_empty(models, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    merge([models / "math"], ".", base_model=models / "base")
    load(workspace)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(models, refused, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    message = refused([models / "math"], planned=False, base_model=models / "base")
    assert says(message, "No space", "72.3 kB", "1 kB", "Free some")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system with a fixed number of bytes, and unmounts it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount a small file system: {done.stderr}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def test_a_small_disk_is_refused_before_anything_is_written(models, small_disk):
    disk = small_disk(60_000)
    with pytest.raises(MergeError, match=r"No space"):
        merge([models / "math"], disk / "merged", base_model=models / "base")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("heads", [False, True], ids=["weights", "heads"])
def test_a_disk_that_fills_up_meanwhile_is_reported_and_cleaned(models, small_disk, tmp_path, monkeypatch, heads):
    base, expert = models / "base", models / "math"
    if heads:  # the merged weights find room, but the expert's head does not
        base = models / "bert"
        expert = save_fine_tune(
            base, tmp_path / "tagger", seed=1, model_class="BertForTokenClassification", num_labels=900
        )
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))  # there was room a moment ago
    disk = small_disk(73_728 if heads else 40_960)
    with pytest.raises(MergeError) as caught:
        merge([expert], disk / "merged", base_model=base)
    assert says(str(caught.value), "No space is left", disk)
    assert list(disk.iterdir()) == []


def test_a_mount_point_is_refused_before_anything_is_read(models, small_disk):
    disk = small_disk(10**6)
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], disk, base_model=models / "gone")
    assert says(str(caught.value), disk, "mount point", "inside it")
    merge([models / "math"], disk / "merged", base_model=models / "base")
    assert [path.name for path in disk.iterdir()] == ["merged"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_cannot_be_put_in_its_place_is_reported(models, workspace, monkeypatch, overwrite):
    def refuse(path, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path, None, target)

    (workspace / "merged").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], workspace / "merged", base_model=models / "base", overwrite=overwrite)
    assert says(str(caught.value), workspace / "merged", "cross-device", "Choose another")
    assert [path.name for path in workspace.iterdir()] == ["merged"]


def test_a_place_that_may_not_be_written_is_refused(models):
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], "/proc/merged", base_model=models / "base")
    assert says(str(caught.value), "/proc/merged", "cannot be written")


# ------------------------------------------------------------------------------------------------ several at once


def test_several_problems_are_reported_together(models, copied, tmp_path, refused):
    expert, adapter = copied("math"), copied("code")
    (expert / "model.safetensors").write_bytes(b"")
    (adapter / "adapter_model.safetensors").unlink()
    message = refused([models / "sharded", expert, adapter], base_model=models / "base")
    assert says(message, "2 problems were found:\n  * ", expert / "model.safetensors", adapter)

    wider = save_llama(tmp_path / "wider", hidden_size=64)
    message = refused([models / "bert", wider], base_model=models / "base")
    assert says(message, "2 problems", models / "bert", wider)

    message = refused(["./gone", "nobody/nothing", models / "math"], base_model=models / "base")
    assert says(message, "2 problems", "./gone", "nobody/nothing")


def test_the_error_lists_its_problems(models):
    with pytest.raises(MergeError) as caught:
        plan_merge(["./gone", "./away"], base_model=models / "base")
    assert len(caught.value.problems) == 2
    assert isinstance(caught.value, ValueError)
