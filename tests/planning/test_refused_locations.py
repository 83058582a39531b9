"""A model that is nowhere, or may not be read, is refused with what to check."""

from changes import says


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
