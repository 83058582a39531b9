"""What somebody linked into a finished merge is neither published nor overwritten."""

import shutil

import pytest

from commands import run
from neuromerge_hf import AutoMergedModel, MergeError, add_results, merge
from neuromerge_hf.hub.push import push
from tiny_models import save_classifiers, save_llamas


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    models = save_classifiers(save_llamas(tmp_path_factory.mktemp("models")))
    merge([models / "math", models / "code"], root / "merged")
    merge([models / "topics", models / "moods"], root / "heads", base_model=models / "encoder")
    return root


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made / "merged", tmp_path / "merged")


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("private")
    return path


@pytest.mark.parametrize("name", ["README.md", "neuromerge.png", "merge_report.json", "recipe.yaml", "config.json"])
def test_a_card_is_neither_made_from_a_link_nor_written_to_one(hub, merged, secret, name):
    secret.write_bytes((merged / name).read_bytes() + b" ")
    before = secret.read_bytes()
    (merged / name).unlink()
    (merged / name).symlink_to(secret)
    with pytest.raises(MergeError, match=rf"{name} is a link, and no card is made from links or written to them"):
        push(merged, "links/card")
    done = run("card", merged)
    assert done.exit_code == 1
    assert f"{name} is a link" in done.output
    with pytest.raises(MergeError, match=f"{name} is a link"):
        add_results(merged, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.9}])
    assert secret.read_bytes() == before
    assert "links/card" not in hub.repos


def test_links_and_what_lies_behind_them_are_left_out_with_a_word(hub, made, tmp_path, secret, caplog):
    folder = shutil.copytree(made / "heads", tmp_path / "heads")
    shutil.move(folder / "heads" / "topics", tmp_path / "topics")
    (folder / "heads" / "topics").symlink_to(tmp_path / "topics")
    (folder / "LICENSE").symlink_to(secret)
    (tmp_path / "by-a-link").symlink_to(folder)
    push(tmp_path / "by-a-link", "links/left-out")
    pushed = hub.files("links/left-out")
    assert "heads/moods/head.safetensors" in pushed
    assert not [name for name in pushed if name.startswith(("LICENSE", "heads/topics"))]
    for name in ("LICENSE", "heads/topics/head.safetensors"):
        assert f"{name} is not uploaded, because it is or lies behind a link." in caplog.text


def test_the_card_that_a_push_sets_aside_does_not_overwrite_what_a_link_points_to(hub, merged, secret):
    push(merged, "links/aside")
    hub_card = hub.files("links/aside")["README.md"].decode()
    hub.add_folder("links/aside", shutil.copytree(merged, merged.parent / "theirs"))
    (merged.parent / "theirs" / "README.md").write_text(hub_card + "\nTheirs.\n")
    hub.add_folder("links/aside", merged.parent / "theirs")
    (merged / "README.md").write_text(hub_card + "\nOurs.\n")
    (merged / "README.before-push.md").symlink_to(secret)
    push(merged, "links/aside")
    assert secret.read_text() == "private"
    assert "Ours." in (merged / "README.before-push-2.md").read_text()


@pytest.mark.parametrize("changed", [False, True])
def test_saving_a_loaded_merge_does_not_copy_what_was_linked_into_it_since(made, tmp_path, secret, caplog, changed):
    folder = shutil.copytree(made / "merged", tmp_path / "folder")
    model = AutoMergedModel.from_pretrained(folder)
    (folder / "LICENSE").symlink_to(secret)
    if changed:
        model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert not (tmp_path / "saved" / "LICENSE").exists()
    assert "LICENSE is left out: it leads out of its folder" in caplog.text
