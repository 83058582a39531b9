"""What goes wrong beside the weights is found before they are read, and what is only nice to have costs no merge."""

import json

import matplotlib.font_manager
import pytest

from changes import says
from neuromerge_hf import merge, plan_merge
from neuromerge_hf.model_cards import picture
from neuromerge_hf.planning.costs import CARD_BYTES
from tiny_models import contents


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("generation_config.json", "{"),
        ("tokenizer.json", "{"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_file_beside_the_weights_that_cannot_be_read_is_in_the_plan(models, copied, refused, name, content):
    base = copied("base")
    (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says(refused([models / "code"], base_model=base), base / name, "cannot be read")


def test_the_disk_must_hold_what_is_copied_and_the_card(models, copied, tmp_path):
    base, math = copied("base"), copied("math")
    before = plan_merge([math], base_model=base)
    (base / "spiece.model").write_bytes(b" " * 1000)
    (math / "LICENSE").write_bytes(b" " * 2000)
    plan = plan_merge([math], base_model=base)
    assert plan.disk_needed == before.disk_needed + 3000
    report = merge([math], tmp_path / "merged", base_model=base)
    files = [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    assert plan.disk_needed <= sum(path.stat().st_size for path in files) + CARD_BYTES
    assert plan.disk_needed >= sum(path.stat().st_size for path in files)
    assert report.bytes_written == plan.bytes_written


def test_a_picture_that_cannot_be_drawn_costs_no_merge(models, tmp_path, caplog, monkeypatch):
    merge([models / "math"], tmp_path / "drawn", base_model=models / "base")
    monkeypatch.setattr(matplotlib.font_manager, "get_font", None)  # as where no font can be opened
    merge([models / "math"], tmp_path / "merged", base_model=models / "base")
    assert "The picture of the card was not drawn" in caplog.text
    assert picture.NAME not in (tmp_path / "merged" / "README.md").read_text()
    assert picture.NAME in (tmp_path / "drawn" / "README.md").read_text()
    assert not (tmp_path / "merged" / picture.NAME).exists()
    assert contents(tmp_path / "drawn") == contents(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["diagnostics"]
