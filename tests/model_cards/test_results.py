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
        ["sums", "accuracy", "", "0.25", "0.8", "0.3", "0.6", "75.0%"],
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
        ["sums", "accuracy", "0.8 (`math`)", "0.6", "75.0%"],
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
        ({"model": "merged", "task": "sums", "metric": "accuracy"}, "each result needs model, task, metric and value"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": 1, "x": 1}, "each result needs model"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": float("nan")}, "not a finite number"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": "0.5"}, "not a finite number"),
        ({"model": "merged", "task": "sums", "metric": "accuracy", "value": True}, "not a finite number"),
        ({"model": "merged", "task": "", "metric": "accuracy", "value": 1}, "needs a text as its task"),
        ({"model": "biology", "task": "sums", "metric": "accuracy", "value": 1}, "merged, base, math, code"),
        ("0.5", "each result needs model"),
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
        ("[1]", "each result needs model"),
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


def test_the_last_row_of_the_table_has_the_averages(merged):
    scores = {"sums": (0.2, 0.8, 0.6), "words": (0.4, 0.6, 0.5)}
    add_results(
        merged,
        [
            Result(model, task, "accuracy", value)
            for (task, values), expert in zip(scores.items(), ("math", "code"), strict=True)
            for model, value in zip(("base", expert, "merged"), values, strict=True)
        ],
    )
    rows = table_under(card_of(merged)[1], "Evaluation")
    assert rows[-1] == ["**average**", "", "**0.3**", "**0.7**", "**0.55**", "**78.6%**"]
    add_results(merged, [Result("merged", "verbs", "F1", 0.1)])
    assert "average" not in card_of(merged)[1], "of an accuracy and an F1"


@pytest.mark.parametrize(
    ("metric", "values", "fits"),
    [
        ("accuracy", (60, 0.7), False),
        ("eval_accuracy", (0.6, 70), False),
        ("Exact Match", (60, 0.7), False),
        ("accuracy", (60, 70), True),
        ("accuracy", (60, 0), True),
        ("accuracy", (1, 0.7), True),
        ("perplexity", (60, 0.7), True),
        ("mape", (60, 0.7), True),
    ],
)
def test_shares_of_1_do_not_stand_beside_shares_of_100(metric, values, fits, merged):
    results = [Result("merged", task, metric, value) for task, value in zip(("sums", "words"), values, strict=True)]
    if fits:
        add_results(merged, results)
        return
    with pytest.raises(MergeError, match=r"are on two scales: .*Give all of them as shares of 1"):
        add_results(merged, results)
    assert load_report(merged).results == []


def test_a_result_without_a_data_set_gets_no_sentence_for_its_id(merged):
    add_results(
        merged,
        [
            Result("merged", "Which of ten countries a city is in", "accuracy", 0.5, dataset="not an id"),
            Result("merged", "Whether a name is German", "accuracy", 0.6),
            Result("merged", "sums", "accuracy", 0.7, dataset="org/sums"),
        ],
    )
    (index,) = card_of(merged)[0]["model-index"]
    found = [(result["dataset"]["name"], result["dataset"]["type"]) for result in index["results"]]
    assert found == [
        ("Which of ten countries a city is in", "unlisted-1"),
        ("Whether a name is German", "unlisted-2"),
        ("sums", "org/sums"),
    ]
