"""The model card of a merge tells the truth about it, whoever wrote the names in it."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml
from markdown_it import MarkdownIt
from transformers import CLIPConfig, CLIPModel, T5Config, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge
from neuromerge_hf.cli import app
from neuromerge_hf.folder.parents import Parent, is_gated
from neuromerge_hf.folder.recipe import file_hash
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.folder.results import Result
from neuromerge_hf.model_cards import MergeCard, write_card
from neuromerge_hf.model_cards.tasks import task_of
from neuromerge_hf.storage.location import locate
from tiny_models import save_adapter, save_bert, save_fine_tune, save_llama, save_tokenizer

SECTIONS = [
    "Quick start",
    "What went in",
    "Method",
    "What became of the parameters",
    "What the fine-tunes changed",
    "Evaluation",
    "Make it again",
    "Licences",
    "Limits",
    "Citation",
]

HOSTILE = [
    "pipe|in|the|name",
    "`code` and ``more``",
    "two\nlines\n\n# and a heading",
    "--- a: b",
    "<script>alert(1)</script>",
    "<!-- neuromerge: end mark -->",
    "\u202egnihtemos \u200bhidden",
    "[link](javascript:x) ![image](x)",
    "{{ card.recipe }} {% raw %}",
    "@everyone https://example.com $x$ :smile:",
    "no",
]


def save_card(folder, **metadata):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_bert(folder / "base")
    save_fine_tune(base, folder / "math", seed=1, model_class="BertForSequenceClassification", num_labels=3)
    save_adapter(base, folder / "code", seed=2)
    save_card(base, license="apache-2.0", language="en", datasets=["org/words"])
    save_card(folder / "math", license="apache-2.0", language=["en", "pt"], datasets=["org/sums"])
    save_card(folder / "code", license="apache-2.0", pipeline_tag="text-generation")
    return folder


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "merged"
    merge([models / "math", models / "code"], folder, base_model=models / "base")
    return folder


@pytest.fixture
def merged(finished, tmp_path):
    """A merge of the test's own to write in."""
    return shutil.copytree(finished, tmp_path / "merged")


def card_of(folder):
    """The metadata and the body of a card."""
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def parse(body):
    return MarkdownIt("commonmark").enable("table").parse(body)


def headings(body):
    tokens = parse(body)
    return [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]


def code_blocks(body, language):
    return [token.content for token in parse(body) if token.type == "fence" and token.info == language]


def table_under(body, heading):
    """The cells of the first table under a heading."""
    rows, inside = [], False
    for token in parse(body.partition(f"## {heading}\n")[2]):
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        inside = token.type in ("td_open", "th_open") or (inside and token.type == "inline")
        if token.type == "inline" and inside:
            rows[-1].append(token.content)
    return rows


# ------------------------------------------------------------------------------------------------------ what it says


def test_a_merge_writes_its_card_with_the_sections_that_it_can_fill(finished):
    _, body = card_of(finished)
    assert headings(body) == ["merged", *(section for section in SECTIONS if section not in ("Evaluation", "Licences"))]
    assert "2 fine-tunes of `base`\n(`math` and `code`), merged into one model" in body
    assert "has not been evaluated" in body


def test_the_ingredients_are_listed_with_kind_task_and_licence(finished):
    _, body = card_of(finished)
    assert table_under(body, "What went in") == [
        ["role", "model", "kind", "task", "licence"],
        ["base", "`base`", "", "", "apache-2.0"],
        ["expert", "`math`", "full fine-tune", "text-classification", "apache-2.0"],
        ["expert", "`code`", "LoRA r=4", "text-generation", "apache-2.0"],
    ]


def test_every_hyper_parameter_is_marked_default_or_chosen(models, tmp_path):
    config = NeuroMergingConfig(density=0.5, exclude=("pooler.*",))
    report = merge([models / "math"], tmp_path / "merged", base_model=models / "base", config=config, tokenizer="base")
    table = {row[0]: row[1:] for row in table_under(card_of(tmp_path / "merged")[1], "Method")}
    assert table["`density`"] == ["`0.5`", "chosen"]
    assert table["`exclude`"] == ["`pooler.*`", "chosen"]
    assert table["`lambda_parallel`"] == ["`0.0`", "default"]
    assert table["`lambda_orthogonal`"] == [f"`auto`, which gave {report.lambda_orthogonal:.4g}", "default"]
    assert table["`tokenizer`"] == ["`base`", "default"]


def test_the_fate_of_every_parameter_adds_up_to_the_model(finished):
    table = table_under(card_of(finished)[1], "What became of the parameters")
    counts = {row[0]: row[2:4] for row in table}
    assert counts["weights with neurons"] == ["16", "11,568"]
    assert counts["vectors (biases, norms) and scalars"] == ["23", "600"]
    assert table[-1] == ["heads that the base lacks", "kept apart, in `heads/`", "2", "", "those of `math`"]


def test_the_weights_are_listed_with_the_hashes_of_the_files_as_they_are(merged):
    (merged / "model.safetensors").write_bytes(b"other weights")
    write_card(merged)
    text = (merged / "README.md").read_text()
    for name in ("model.safetensors", "heads/math/head.safetensors"):
        assert f"| `{name}` | `{file_hash(merged / name)}` |" in text


def test_metadata_has_what_the_parents_agree_on_and_all_that_they_name(finished):
    metadata, _ = card_of(finished)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["merge", "neuromerging"],
        "license": "apache-2.0",
        "language": ["en", "pt"],
        "datasets": ["org/sums", "org/words"],
    }


def test_models_on_the_hub_are_named_in_the_metadata_and_linked_at_their_commits(models, tmp_path, hub):
    commit = hub.add_folder("org/base", models / "base")
    hub.add_folder("org/many", models, revision="main")  # the experts are folders of one repository
    merge(["org/many/math", models / "code"], tmp_path / "merged", base_model="org/base")
    metadata, body = card_of(tmp_path / "merged")
    assert metadata["base_model"] == ["org/base", "org/many"]
    assert metadata["base_model_relation"] == "merge"
    assert ["base", "[`org/base`](https://huggingface.co/org/base)", f"`{commit[:8]}`"] == table_under(
        body, "What went in"
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


# ----------------------------------------------------------------------------------------------------- the quick start


def add_settings(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def save_model(folder, kind):
    if kind == "llama":
        return save_llama(folder)
    if kind == "llama with a chat template":
        save_llama(folder)
        (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
        return folder
    if kind == "llama with a chat template of older times":
        save_llama(folder)
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        add_settings(folder / "tokenizer_config.json", chat_template=template)
        return folder
    if kind == "llama that came with code":
        save_llama(folder)
        add_settings(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
        return folder
    if kind in ("T5ForConditionalGeneration", "T5Model"):
        return save_t5(folder, kind)
    if kind == "CLIP":
        return save_clip(folder)
    if kind == "ViT":
        return save_vit(folder)
    return save_bert(folder, kind)


def save_t5(folder, model_class="T5ForConditionalGeneration"):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    getattr(transformers, model_class)(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_clip(folder):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**size, "vocab_size": 40, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_vit(folder):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "words", "tag"),
    [
        ("llama", 'pipeline("text-generation", "./merged")', "text-generation"),
        ("llama with a chat template", '"role": "user"', "text-generation"),
        ("llama with a chat template of older times", '"role": "user"', "text-generation"),
        ("llama that came with code", 'pipeline("text-generation", "./merged")', "text-generation"),
        ("BertModel", "AutoModel.from_pretrained", "feature-extraction"),
        ("BertForSequenceClassification", "classify", "text-classification"),
        ("BertForTokenClassification", "tag", "token-classification"),
        ("BertForMaskedLM", "fill", "fill-mask"),
        ("BertForQuestionAnswering", "answer", "question-answering"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
        ("T5Model", "AutoModel.from_pretrained", "feature-extraction"),
        ("CLIP", "AutoModel.from_pretrained", "feature-extraction"),
        ("ViT", "AutoModelForImageClassification", "image-classification"),
    ],
)
def test_the_quick_start_runs_as_it_is_pasted(kind, words, tag, tmp_path, monkeypatch):
    base = save_model(tmp_path / "base", kind)
    save_fine_tune(base, tmp_path / "expert", seed=1)
    merge([tmp_path / "expert"], tmp_path / "merged", base_model=base)
    metadata, body = card_of(tmp_path / "merged")
    code = code_blocks(body, "python")[0]
    assert words in code
    assert metadata.get("pipeline_tag") == tag
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_lines_that_put_a_head_on_run_as_they_are_pasted(merged, monkeypatch):
    code = code_blocks(card_of(merged)[1], "python")[1]
    monkeypatch.chdir(merged.parent)
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"


def test_a_card_of_a_model_with_one_head_on_promises_no_others(merged, tmp_path):
    AutoMergedModel.from_pretrained(merged, head="math", cache_dir=tmp_path / "cache").save_pretrained(tmp_path / "one")
    _, body = card_of(tmp_path / "one")
    assert "It has the task head of `math`." in body
    assert "lie beside the merged weights" not in body
    fates = {row[1]: row[4] for row in table_under(body, "What became of the parameters")}
    assert fates["in the weights, as it was"] == "those of `math`"
    assert "kept apart, in `heads/`" not in fates


def test_a_model_with_images_is_not_listed_as_one_that_generates_text():
    assert task_of("Gemma3ForConditionalGeneration").pipeline_tag == "image-text-to-text"
    assert task_of("Gemma3ForCausalLM").pipeline_tag == "text-generation"


# --------------------------------------------------------------------------------------------------------- licences


def test_metadata_that_the_hub_would_refuse_are_left_out(models, tmp_path):
    for name in ("base", "math"):
        shutil.copytree(models / name, tmp_path / name)
        save_card(
            tmp_path / name,
            license=["Apache 2.0"],
            language=["English", "en", "multilingual"],
            datasets=["/home/somebody/data.csv", "org/words"],
        )
    merge([tmp_path / "math"], tmp_path / "merged", base_model=tmp_path / "base")
    metadata, body = card_of(tmp_path / "merged")
    assert "license" not in metadata
    assert metadata["language"] == ["en", "multilingual"]
    assert metadata["datasets"] == ["org/words"]
    assert "somebody" not in body
    assert [row[-1] for row in table_under(body, "What went in")] == ["licence", "Apache 2.0", "Apache 2.0"]


def with_parents(folder, *parents):
    """A merge whose parents say something else of themselves; its card."""
    report = load_report(folder)
    dataclasses.replace(report, parents=list(parents)).save(folder)
    write_card(folder)
    return card_of(folder)


def test_licences_that_differ_are_left_out_of_the_metadata_and_flagged(merged):
    metadata, body = with_parents(
        merged, Parent(license="apache-2.0"), Parent(license="cc-by-nc-sa-4.0"), Parent(license="gpl-3.0")
    )
    assert "license" not in metadata
    section = body.partition("## Licences")[2].partition("## ")[0]
    assert "**The licences differ.**" in section
    assert "The licence of `math` (cc-by-nc-sa-4.0) forbids commercial use." in section
    assert "The licence of `math` (cc-by-nc-sa-4.0) and `code` (gpl-3.0) asks that" in section


def test_a_licence_that_is_missing_is_no_agreement(merged):
    metadata, body = with_parents(merged, Parent(license="mit"), Parent(license="mit"), Parent())
    assert "license" not in metadata
    assert "No licence is stated by `code`" in body


def test_a_licence_with_a_name_of_its_own_needs_its_link_in_the_metadata(merged):
    own = Parent(license="other", license_name="tongue", license_link="https://example.org/tongue")
    metadata, body = with_parents(merged, own, own, own)
    expected = {"license": "other", "license_name": "tongue", "license_link": "https://example.org/tongue"}
    assert {key: metadata[key] for key in expected} == expected
    assert "(tongue) has conditions of its own" in body
    no_link = dataclasses.replace(own, license_link=None)
    assert "license" not in with_parents(merged, no_link, no_link, no_link)[0]


def test_a_licence_in_a_file_of_the_parents_is_linked_to_in_the_base(merged):
    own = Parent(license="other", license_name="tongue", license_link="LICENSE")
    recipe = yaml.safe_load((merged / "recipe.yaml").read_text())
    assert "license" not in with_parents(merged, own, own, own)[0], "no page has the file of a folder"
    open_one = dataclasses.replace(own, license="mit")
    metadata = with_parents(merged, open_one, open_one, open_one)[0]
    assert metadata["license"] == "mit"
    assert "license_link" not in metadata
    for place, path in {"org/base": "LICENSE", "org/base/small model": "small%20model/LICENSE"}.items():
        recipe["base_model"] = {"id": place, "revision": "1234abcd"}
        (merged / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        metadata = with_parents(merged, own, own, own)[0]
        assert metadata["license"] == "other"
        assert metadata["license_link"] == f"https://huggingface.co/org/base/blob/1234abcd/{path}"


def test_licences_and_notices_of_all_parents_go_along(models, tmp_path, hub):
    for name in ("base", "math", "code"):
        shutil.copytree(models / name, tmp_path / "parents" / name)
    base, math, code = (tmp_path / "parents" / name for name in ("base", "math", "code"))
    (base / "LICENSE").write_text("the base's licence")
    (base / "NOTICE.txt").write_text("the base's notice")
    (math / "license.md").write_text("the licence of math")
    (math / "license.py").write_text("code")
    hub.add_folder("org/with-licence", math)
    merge(["org/with-licence", code], tmp_path / "merged", base_model=base)
    terms = {
        "LICENSE-base": "the base's licence",
        "NOTICE-base.txt": "the base's notice",
        "license-with-licence.md": "the licence of math",
    }
    kept = {path.name: path.read_text() for path in (tmp_path / "merged").iterdir() if "ICE" in path.name.upper()}
    assert kept == terms
    section = card_of(tmp_path / "merged")[1].partition("## Licences")[2].partition("## ")[0]
    assert "is in `LICENSE-base`, `NOTICE-base.txt` and `license-with-licence.md`." in section
    AutoMergedModel.from_pretrained(tmp_path / "merged").push_to_hub("me/with-licences")
    assert terms.keys() <= hub.files("me/with-licences").keys()
    merge(["me/with-licences"], tmp_path / "again", base_model=base)
    assert (tmp_path / "again" / "license-with-licence-with-licences.md").read_text() == "the licence of math"


def test_gated_parents_are_named(merged):
    _, body = with_parents(merged, Parent(license="mit", gated=True), Parent(license="mit"), Parent(license="mit"))
    assert "Access to `base` is gated" in body
    assert table_under(body, "What went in")[1][-1] == "mit, gated"


def test_whether_a_parent_is_gated_is_asked_of_the_hub(models, hub):
    hub.add_folder("org/gated-later", models / "base")
    location = locate("org/gated-later")
    assert not is_gated(location)
    hub.repos["org/gated-later"].gated = True
    assert is_gated(location)
    del hub.repos["org/gated-later"]
    assert not is_gated(location)  # it cannot be asked any more
    assert not is_gated(locate(models / "base"))


@pytest.mark.parametrize("text", ["", "no metadata", "---\n[1, 2\n---\n", "---\nlicense: [1]\nlanguage: {a: 1}\n---\n"])
def test_a_parents_card_that_cannot_be_read_says_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert Parent.of(locate(tmp_path)) == Parent()


def test_citations_of_the_parents_are_carried_over_once(tmp_path, models):
    entry = "@misc{math,\n  title = {BlockStatistics},\n}"
    for name in ("math", "code"):
        shutil.copytree(models / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"# x\n```bibtex\n{entry}\n```\n```bibtex\n@misc{{open, {{\n```\n")
    merge([tmp_path / "math", tmp_path / "code"], tmp_path / "merged", base_model=models / "base")
    blocks = code_blocks(card_of(tmp_path / "merged")[1], "bibtex")
    assert len(blocks) == 2
    assert "NeuroMerging" not in blocks[1]
    assert blocks[1] == f"{entry}\n"


def test_a_merge_of_a_merge_cites_the_method_once(models, finished, tmp_path):
    merge([models / "code"], tmp_path / "merged", base_model=finished)
    assert len(code_blocks(card_of(tmp_path / "merged")[1], "bibtex")) == 1


# ------------------------------------------------------------------------------------------------------- evaluation


def test_results_appear_beside_each_other_with_the_share_that_is_retained(merged):
    load_report(merged).add_results(
        [
            Result("base", "sums", "accuracy", 0.25),
            Result("math", "sums", "accuracy", 0.8),
            Result("code", "sums", "accuracy", 0.3),
            Result("merged", "sums", "accuracy", np.float32(0.5), dataset="org/sums", split="test"),
            Result("merged", "sums", "accuracy", torch.tensor(0.6)),
            Result("merged", "sums", "loss", 1.5, greater_is_better=False),
            Result("math", "sums", "loss", 1.2, greater_is_better=False),
        ]
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
    load_report(merged).add_results(
        [
            Result("math", "sums", "accuracy", 0.8),
            Result("merged", "sums", "accuracy", 0.6),
            Result("code", "words", "accuracy", 0.5),
        ]
    )
    assert table_under(card_of(merged)[1], "Evaluation") == [
        ["task", "metric", "expert", "merged", "retained"],
        ["sums", "accuracy", "0.8 (`math`)", "0.6", "75.0 %"],
        ["words", "accuracy", "0.5 (`code`)", "", ""],
    ]


def test_newer_results_replace_older_ones_of_the_same(merged):
    report = load_report(merged)
    report.add_results([Result("merged", "sums", "accuracy", 0.1), Result("merged", "words", "accuracy", 0.2)])
    report.add_results([Result("merged", "sums", "accuracy", 0.3)])
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
        load_report(merged).add_results([good, entry])
    assert (merged / "README.md").read_bytes() == before
    assert load_report(merged).results == []


# ------------------------------------------------------------------------------------------------ what people wrote


def test_text_around_the_card_and_added_metadata_survive(merged):
    path = merged / "README.md"
    metadata, body = card_of(merged)
    metadata |= {"tags": ["merge", "neuromerging", "mine"], "thumbnail": "x.png", "license": "mit"}
    metadata["model-index"] = [{"name": "old", "results": []}]
    path.write_text(f"---\n{yaml.safe_dump(metadata)}---\nMy **own** words.\n{body}\nAnd more of them.\n")
    with_results = write_card(merged).read_text()
    new, text = card_of(merged)
    assert text.startswith("My **own** words.\n<!-- neuromerge")
    assert text.endswith("And more of them.\n")
    assert new["tags"] == ["merge", "neuromerging", "mine"]
    assert new["thumbnail"] == "x.png"
    assert new["license"] == "apache-2.0", "the card knows that itself"
    assert "model-index" not in new
    assert write_card(merged).read_text() == with_results


def test_a_licence_that_somebody_chose_survives_but_an_agreement_that_is_none_any_more_does_not(merged):
    disagreeing = Parent(license="mit"), Parent(license="gpl-3.0"), Parent(license="mit")
    metadata, body = with_parents(merged, *disagreeing)
    assert "license" not in metadata
    (merged / "README.md").write_text(f"---\n{yaml.safe_dump(metadata | {'license': 'gpl-3.0'})}---\n{body}")
    assert with_parents(merged, *disagreeing)[0]["license"] == "gpl-3.0"


def test_a_card_that_is_all_hand_written_is_kept_below(merged):
    write_card(merged, previous="---\nlicense: mit\n---\n# My model\n\nWords.\n")
    _, body = card_of(merged)
    assert body.endswith("# My model\n\nWords.\n")
    assert headings(body)[0] == "merged"


def test_damaged_metadata_of_an_earlier_card_is_replaced(merged):
    write_card(merged, previous="---\n[1, 2\n---\nwords\n")
    metadata, body = card_of(merged)
    assert metadata["tags"] == ["merge", "neuromerging"]
    assert body.endswith("words\n")


def test_sections_are_overridden_by_a_template_of_the_users(merged, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        '{% extends "merge.md.jinja" %}{% block limits %}## Known flaws\n\nMany, {{ card.name }}.\n\n{% endblock %}'
        "{% block citation %}{% endblock %}"
    )
    write_card(merged, template=template)
    _, body = card_of(merged)
    assert "Many, merged." in body
    assert headings(body)[-2:] == ["Make it again", "Known flaws"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% block x %}", "mine.jinja, line 1 cannot be used"),
        ("{{ card.nothing }}", "mine.jinja cannot be used: .*no attribute 'nothing'"),
        (None, "mine.jinja cannot be used: .*No such file"),
    ],
)
def test_a_template_that_does_not_work_is_named_and_the_card_stays(text, message, merged, tmp_path):
    template = tmp_path / "mine.jinja"
    if text is not None:
        template.write_text(text)
    before = (merged / "README.md").read_bytes()
    with pytest.raises(MergeError, match=message):
        write_card(merged, template=template)
    assert (merged / "README.md").read_bytes() == before


# -------------------------------------------------------------------------------------------------- names of strangers


def outline(body):
    """What is on a page, but for its words: blocks, the kinds of what is in them, and the cells of tables."""
    found = []
    for token in parse(body):
        if token.type != "inline":
            found.append(token.type)
        found += [child.type for child in token.children or [] if child.type in ("link_open", "image", "html_inline")]
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_yaml_or_the_markdown(name, merged):
    content = json.loads((merged / "merge_report.json").read_text())

    def render(word):
        for expert, place in zip(content["experts"], ("first", "second"), strict=True):
            expert |= {"name": f"{word} {place}", "kind": word, "ignored": [word]}
            for expert in content["diagnostics"]["experts"]:
                expert["name"] = word
        licence = {"license": "other", "license_name": word, "license_link": f"https://example.org/{word}"}
        content["parents"] = [{**licence, "task": word, "datasets": ["org/words", f"{word}/"]}] * 3
        content["notes"] = [word]
        content["tokenizer"] = word
        content["results"] = [{"model": "merged", "task": word, "metric": word, "value": 1, "split": word}]
        (merged / "merge_report.json").write_text(json.dumps(content))
        (merged / "README.md").unlink(missing_ok=True)
        write_card(merged, name=word)
        return card_of(merged)

    plain, plain_body = render("plain")
    metadata, body = render(name)
    assert metadata.keys() == plain.keys()
    assert metadata["license_name"] == name
    assert metadata["datasets"] == ["org/words"]
    assert outline(body) == outline(plain_body)
    assert [len(row) for row in table_under(body, "What went in")] == [5, 5, 5, 5]
    assert not any(letter in body for letter in "\u202e\u200b")
    write_card(merged, name=name)
    assert card_of(merged) == (metadata, body), "the markers are found again"


def test_a_heading_at_the_start_of_an_earlier_card_stays_a_heading(merged):
    write_card(merged, previous="---\nlicense: mit\n---\n# My words\n")
    assert headings(card_of(merged)[1])[-1] == "My words"


def test_a_folder_of_any_name_is_quoted_in_the_quick_start(finished, tmp_path, monkeypatch):
    name = "a \"quoted\" 'name' ü 😀 $(x)"
    shutil.copytree(finished, tmp_path / name)
    (code, _) = code_blocks(card_of((write_card(tmp_path / name)).parent)[1], "python")
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_nothing_that_is_published_names_a_place_on_this_machine(models, tmp_path, hub):
    math = shutil.copytree(models / "math", tmp_path / "math")
    base = shutil.copytree(models / "base", tmp_path / "base")
    save_tokenizer(math)
    add_settings(math / "tokenizer_config.json", name_or_path=str(math), special_tokens_map_file=f"{math}/map.json")
    add_settings(base / "config.json", _name_or_path=str(base), teacher={"_name_or_path": str(base)})
    report = merge([math, models / "code"], tmp_path / "merged", base_model=base, tokenizer=str(math))
    secrets = [str(models), str(tmp_path), str(models.parent)]
    for path in (tmp_path / "merged").rglob("*"):
        if path.is_file() and path.name != "recipe.yaml":  # which is published without them, see test_recipe.py
            assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert str(tmp_path) in str(report), "on the screen, the place is what one wants to know"


def test_two_models_of_one_name_are_told_apart(models, tmp_path):
    for side in "ab":
        shutil.copytree(models / "math", tmp_path / side / "base")
    merge([tmp_path / "a/base", tmp_path / "b/base"], tmp_path / "merged", base_model=models / "base")
    assert "Not on the Hub are `base-base`, `base` and `base-2`." in (tmp_path / "merged/README.md").read_text()


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    [(None, "cannot be read"), ("[1,", "are not JSON"), ('{"a": 1}', "must be a list"), ("[1]", "it needs model")],
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


def test_a_damaged_report_is_named(merged):
    (merged / "merge_report.json").write_text('{"experts": 1}')
    with pytest.raises(MergeError, match=r"merge_report.json is not a report"):
        MergeCard.of(merged)
