"""Measurements stand beside each other in a card and in its metadata; those that say nothing are refused."""

import json

import numpy as np
import pytest
import torch

from cards import card_of, headings, table_under
from commands import run
from neuromerge_hf import MergeError
from neuromerge_hf.api import add_results
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.folder.results import Result


def test_results_appear_beside_each_other_with_the_share_that_is_retained(merged):
    add_results(
        merged,
        [
            Result("base", "sums", "accuracy", 0.25),
            Result("math", "sums", "accuracy", 0.8),
            Result("code", "sums", "accuracy", 0.3),
            Result("merged", "sums", "accuracy", np.float32(0.5), dataset="org/sums", split="test"),
            Result("merged", "sums", "accuracy", torch.tensor(0.6)),
            Result("merged", "sums", "loss", 1.5, greater_is_better=False),
            Result("math", "sums", "loss", 1.2, greater_is_better=False),
        ],
    )
    metadata, body = card_of(merged)
    assert table_under(body, "Evaluation") == [
        ["task", "metric", "split", "base", "`math`", "`code`", "merged", "retained"],
        ["sums", "accuracy", "", "0.25", "0.8", "0.3", "0.6", "75.0 %"],
        ["sums", "accuracy", "test", "", "", "", "0.5", ""],
        ["sums", "loss", "", "", "1.2", "", "1.5", ""],
    ]
    assert "has not been evaluated" not in body
    (index,) = metadata["model-index"]
    types = {result["dataset"].get("split"): result["task"]["type"] for result in index["results"]}
    assert types[None] == "text-classification", "what math, which was measured beside it, is for"
    assert types["test"] == "feature-extraction", "what the merge itself is for"
    values = [metric["value"] for result in index["results"] for metric in result["metrics"]]
    assert values == [0.5, pytest.approx(0.6), 1.5]
    assert "org/sums" in {result["dataset"]["type"] for result in index["results"]}


def test_experts_that_were_measured_each_on_its_own_task_share_a_column(merged):
    add_results(
        merged,
        [
            Result("math", "sums", "accuracy", 0.8),
            Result("merged", "sums", "accuracy", 0.6),
            Result("code", "words", "accuracy", 0.5),
        ],
    )
    assert table_under(card_of(merged)[1], "Evaluation") == [
        ["task", "metric", "expert", "merged", "retained"],
        ["sums", "accuracy", "0.8 (`math`)", "0.6", "75.0 %"],
        ["words", "accuracy", "0.5 (`code`)", "", ""],
    ]


def test_newer_results_replace_older_ones_of_the_same(merged):
    report = load_report(merged)
    add_results(
        report.output_dir, [Result("merged", "sums", "accuracy", 0.1), Result("merged", "words", "accuracy", 0.2)]
    )
    add_results(report.output_dir, [Result("merged", "sums", "accuracy", 0.3)])
    assert [result.value for result in load_report(merged).results] == [0.3, 0.2]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model": "merged", "task": "sums", "metric": "accuracy"}, "it needs model, task, metric and value"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": 1, "x": 1}, "it needs model"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": float("nan")}, "not a finite number"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": "0.5"}, "not a finite number"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": True}, "not a finite number"),
        ({"model": "merged", "task": "", "metric": "accuracy", "value": 1}, "needs a text as its task"),
        ({"model": "biology", "task": "sums", "metric": "accuracy", "value": 1}, "merged, base, math, code"),
        ("0.5", "it needs model"),
    ],
)
def test_results_that_say_nothing_are_refused_and_none_is_added(entry, message, merged):
    before = (merged / "README.md").read_bytes()
    good = Result("merged", "sums", "accuracy", 0.1)
    with pytest.raises(MergeError, match=message):
        add_results(merged, [good, entry])
    assert (merged / "README.md").read_bytes() == before
    assert load_report(merged).results == []


def test_the_command_refreshes_the_card_with_results(merged, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"model": "merged", "task": "sums", "metric": "accuracy", "value": 0.5}]))
    done = run("card", merged, "--repo-id", "me/sums", "--results", results)
    assert done.exit_code == 0, done.output
    assert str(merged / "README.md") in done.stdout
    _, body = card_of(merged)
    assert headings(body)[0] == "sums"
    assert '"me/sums"' in body
    assert table_under(body, "Evaluation")[1] == ["sums", "accuracy", "0.5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[1,", "cannot be read: Expecting value"),
        ('{"a": 1}', "is no list"),
        ("[1]", "it needs model"),
    ],
)
def test_the_command_refuses_results_that_it_cannot_read(content, message, merged, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    done = run("card", merged, "--results", tmp_path / "results.json")
    assert done.exit_code == 1
    assert message in done.stderr


def test_the_command_says_when_a_folder_is_no_merge(models):
    done = run("card", models / "base")
    assert done.exit_code == 1
    assert "merge_report.json cannot be read" in done.stderr
