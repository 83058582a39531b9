"""The folder of a trained model holds the earlier model or the new one, whatever happens while it is saved."""

from pathlib import Path

import pytest

from neuromerge_hf.callbacks.common.trained_model import replaced_model


def save(folder: Path, *names: str) -> None:
    with replaced_model(folder) as made:
        for name in names:
            (made / name).write_text("new")


def test_a_trained_model_replaces_the_one_before_and_keeps_other_files(tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    old = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.bin"]
    for name in (*old, "notes.txt", "tokenizer.json"):
        (trained / name).write_text("old")
    (trained / "logs").mkdir()
    (trained / "logs" / "train.log").write_text("old")
    save(trained, "model.safetensors", "tokenizer.json")
    found = {path.relative_to(trained).as_posix(): path.read_text() for path in trained.rglob("*") if path.is_file()}
    assert found == {"model.safetensors": "new", "tokenizer.json": "new", "notes.txt": "old", "logs/train.log": "old"}
    assert list(tmp_path.iterdir()) == [trained]


def test_a_trained_model_that_cannot_be_saved_leaves_the_one_before(tmp_path):
    save(tmp_path / "trained", "model.safetensors")

    def fail() -> None:
        with replaced_model(tmp_path / "trained") as made:
            (made / "config.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in (tmp_path / "trained").iterdir()] == ["model.safetensors"]
