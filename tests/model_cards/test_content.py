"""A card says what went into the merge, how it was made and what became of the parameters."""

import pytest

from cards import SECTIONS, card_of, headings, table_under
from neuromerge_hf import MergeError, NeuroMergingConfig, merge
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.model_cards import MergeCard, write_card
from neuromerge_hf.model_cards.tasks import task_of
from neuromerge_hf.storage.hashing import file_hash
from neuromerge_hf.text import kind_of


def test_a_merge_writes_its_card_with_the_sections_that_it_can_fill(finished):
    _, body = card_of(finished)
    assert headings(body) == ["merged", *(section for section in SECTIONS if section not in ("Evaluation", "Licences"))]
    assert "2 fine-tunes of `base`\n(`math` and `code`), merged into one model" in body
    assert "has not been evaluated" in body


def test_the_merged_models_are_listed_with_kind_task_and_licence(finished):
    _, body = card_of(finished)
    assert table_under(body, "Merged models") == [
        ["role", "model", "kind", "task", "licence"],
        ["base", "`base`", "", "", "apache-2.0"],
        ["expert", "`math`", "full fine-tune", "text-classification", "apache-2.0"],
        ["expert", "`code`", "LoRA r=4", "text-generation", "apache-2.0"],
    ]


def test_chosen_settings_are_shown_and_those_at_their_defaults_are_folded_away(models, tmp_path):
    config = NeuroMergingConfig(density=0.5, exclude=("pooler.*",))
    report = merge([models / "math"], tmp_path / "merged", base_model=models / "base", config=config, tokenizer="base")
    body = card_of(tmp_path / "merged")[1]
    assert table_under(body, "Method")[1:] == [["`density`", "`0.5`"], ["`exclude`", "`pooler.*`"]]
    folded = body.partition("<summary>6 other settings at their defaults</summary>")[2].partition("</details>")[0]
    assert "| `lambda_parallel` | `0.0` |" in folded
    assert f"| `lambda_orthogonal` | `auto`, which gave {report.lambda_orthogonal:.4g} |" in folded
    assert "| `tokenizer` | `base` |" in folded
    assert "density" not in folded


def test_names_of_unchanged_parameters_are_folded_by_their_kinds(models, tmp_path):
    merge([models / "code"], tmp_path / "merged", base_model=models / "base")
    body = card_of(tmp_path / "merged")[1]
    folded = body.partition("<summary>Unchanged parameters</summary>")[2].partition("</details>")[0]
    names = load_report(tmp_path / "merged").copied
    kinds = {kind_of(name) for name in names}
    listed = {line.split("`")[1] for line in folded.splitlines() if line.startswith("* ")}
    assert listed == kinds
    assert len(kinds) < len(names)


def test_the_fate_of_every_parameter_adds_up_to_the_model(finished):
    table = table_under(card_of(finished)[1], "Parameters")
    counts = {row[0]: row[2:] for row in table}
    assert counts["weights of linear layers"] == ["13", "9,792"]
    assert counts["other weights with neurons"] == ["3", "1,776"]
    assert counts["vectors (biases, norms) and scalars"] == ["23", "600"]
    assert table[-1] == ["heads that the base lacks: `math`", "kept apart, in `heads/`", "2", ""]


def test_the_weights_are_listed_with_the_hashes_of_the_files(merged):
    text = (merged / "README.md").read_text()
    for name in ("model.safetensors", "heads/math/head.safetensors"):
        assert f"| `{name}` | `{file_hash(merged / name)}` |" in text


def test_metadata_has_what_the_parents_agree_on_and_all_that_they_name(finished):
    metadata, _ = card_of(finished)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["merge", "neuro_iso"],
        "license": "apache-2.0",
        "language": ["en", "pt"],
        "datasets": ["org/sums"],
    }


def test_models_on_the_hub_are_named_in_the_metadata_and_linked_at_their_commits(models, tmp_path, hub):
    commit = hub.add_folder("org/base", models / "base")
    hub.add_folder("org/many", models, revision="main")  # the experts are folders of one repository
    merge(["org/many/math", models / "code"], tmp_path / "merged", base_model="org/base")
    metadata, body = card_of(tmp_path / "merged")
    assert metadata["base_model"] == ["org/base", "org/many"]
    assert metadata["base_model_relation"] == "merge"
    assert ["base", "[`org/base`](https://huggingface.co/org/base)", f"`{commit[:8]}`"] == table_under(
        body, "Merged models"
    )[1][:3]
    assert "[`org/many/math`](https://huggingface.co/org/many)" in body
    assert "Not on the Hub is `code`.\n" in body
    write_card(tmp_path / "merged", "me/merged")
    assert "Not on the Hub is `code`: the recipe looks for folders" in card_of(tmp_path / "merged")[1]


def test_a_card_is_the_same_whenever_and_wherever_it_is_rendered(merged, hub):
    first = (merged / "README.md").read_bytes()
    assert write_card(merged).read_bytes() == first
    moved = merged.rename(merged.parent / "elsewhere")
    assert write_card(moved, name="merged").read_bytes() == first.replace(b"./elsewhere", b"./merged")
    assert hub.requests == []


def test_a_model_with_images_is_not_listed_as_one_that_generates_text():
    assert task_of("Gemma3ForConditionalGeneration").pipeline_tag == "image-text-to-text"
    assert task_of("Gemma3ForCausalLM").pipeline_tag == "text-generation"


def test_a_damaged_report_is_named(merged):
    (merged / "merge_report.json").write_text('{"experts": 1}')
    with pytest.raises(MergeError, match=r"merge_report.json is not a report"):
        MergeCard.of(merged)
