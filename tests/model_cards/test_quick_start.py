"""The code in a card runs as it is pasted, for every kind of model."""

import pytest
import transformers
from transformers import CLIPConfig, CLIPModel, T5Config, ViTConfig, ViTForImageClassification

from cards import add_settings, card_of, code_blocks, table_under
from neuromerge_hf import AutoMergedModel, merge
from tiny_models import save_bert, save_fine_tune, save_llama, save_tokenizer


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
    AutoMergedModel.from_pretrained(merged, head="math", merge_cache_dir=tmp_path / "cache").save_pretrained(
        tmp_path / "one"
    )
    _, body = card_of(tmp_path / "one")
    assert "It has the task head of `math`." in body
    assert "lie beside the merged weights" not in body
    fates = {row[1]: row[0] for row in table_under(body, "Parameters")}
    assert fates["in the weights, as it was"] == "heads that the base lacks: `math`"
    assert "kept apart, in `heads/`" not in fates
