"""A card is written again from the report: its text, but not its picture, which shows the merge."""

import json

from neuromerge_hf import add_results
from neuromerge_hf.model_cards import write_card


def test_the_picture_shows_scores_once_they_can_be_compared(merged):
    picture = merged / "neuromerge.png"
    without = picture.read_bytes()
    add_results(merged, [{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.8}])
    assert picture.read_bytes() == without, "no expert's score stands beside it"
    add_results(merged, [{"model": "math", "task": "sums", "metric": "accuracy", "value": 0.9}])
    assert picture.read_bytes() != without
    assert "![Scores of the merged model" in (merged / "README.md").read_text()


def test_what_acts_on_a_terminal_in_an_edited_report_does_not_reach_the_card(merged):
    report = merged / "merge_report.json"
    content = json.loads(report.read_text())
    content["parents"][0]["citations"] = ["@article{x,\n  title = {\x1b[31mred\u202e}\n}"]
    report.write_text(json.dumps(content))
    text = write_card(merged).read_text()
    assert "title = {[31mred}\n" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
