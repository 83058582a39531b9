"""A card is written again from the report: its text, but not its picture, which shows the merge."""

import json

from neuromerge_hf import add_results
from neuromerge_hf.model_cards import write_card


def test_results_do_not_draw_the_picture_again(merged):
    picture, card = merged / "neuromerge.png", merged / "README.md"
    before, text = picture.stat(), card.read_text()
    add_results(merged, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.9}])
    assert card.read_text() != text
    assert (picture.stat().st_ino, picture.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    picture.unlink()
    add_results(merged, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.8}])
    assert picture.is_file()


def test_what_acts_on_a_terminal_in_an_edited_report_does_not_reach_the_card(merged):
    report = merged / "merge_report.json"
    content = json.loads(report.read_text())
    content["parents"][0]["citations"] = ["@article{x,\n  title = {\x1b[31mred\u202e}\n}"]
    report.write_text(json.dumps(content))
    text = write_card(merged).read_text()
    assert "title = {[31mred}\n" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
