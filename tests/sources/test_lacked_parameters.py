"""What an expert's own class lacks is the base's in the merge, with a note. What a damaged file lacks is an error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from changes import change_json, change_tensors, says
from families import CPU, GIVES_BACK, assert_same_bits
from merged_models import read_tensors
from neuromerge_hf import AutoMergedModel, MergeError, merge, plan_merge
from tiny_models import disturb, save_bert, save_llama, seeded

POOLER = ["pooler.dense.bias", "pooler.dense.weight"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with seeded(0):
        vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
        roberta = transformers.RobertaModel(transformers.RobertaConfig(**sizes, vocab_size=40))
    vit.save_pretrained(root / "vit")
    roberta.save_pretrained(root / "roberta")
    return {
        "vit": root / "vit",
        "roberta": root / "roberta",
        "bert": save_bert(root / "bert"),
        "bert-mlm": save_bert(root / "bert-mlm", "BertForMaskedLM"),
        "llama": save_llama(root / "llama", num_hidden_layers=1),
    }


@pytest.fixture
def tuned(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a fine-tune of a base as another class."""

    def tune(base: str, model_class: str, **options: bool) -> Path:
        with seeded(1):
            model: PreTrainedModel = getattr(transformers, model_class).from_pretrained(bases[base], **options)
            disturb(model, scale=0.1)
        model.save_pretrained(tmp_path / model_class)
        return tmp_path / model_class

    return tune


@pytest.mark.parametrize(
    ("base", "model_class", "options", "lacked"),
    [
        ("bert", "BertForTokenClassification", {}, POOLER),
        ("bert", "BertForMaskedLM", {}, POOLER),
        ("bert", "BertModel", {"add_pooling_layer": False}, POOLER),
        ("roberta", "RobertaForQuestionAnswering", {}, POOLER),
        ("vit", "ViTForImageClassification", {}, POOLER),
        ("llama", "LlamaModel", {}, ["lm_head.weight"]),
        ("llama", "LlamaForSequenceClassification", {}, ["lm_head.weight"]),
        ("bert-mlm", "BertModel", {"add_pooling_layer": False}, ["cls.predictions.bias", "cls.predictions.transform"]),
    ],
)
def test_what_the_experts_class_lacks_stays_the_bases(bases, tuned, tmp_path, base, model_class, options, lacked):
    expert = tuned(base, model_class, **options)
    [note] = plan_merge([expert], base_model=bases[base], config=GIVES_BACK, **CPU).experts[0].notes
    assert says(note, f"{expert.name}, a {model_class}, was trained without {lacked[0]}", *lacked)
    merge([expert], tmp_path / "merged", base_model=bases[base], config=GIVES_BACK, **CPU)
    merged, before = read_tensors(tmp_path / "merged"), read_tensors(bases[base])
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        if any(name.startswith(prefix) for prefix in lacked):
            assert_same_bits(tensor, before[name], name)
        else:
            assert not torch.equal(tensor, before[name]), name
    card = (tmp_path / "merged" / "README.md").read_text().replace("\\", "")
    assert note in card


def test_a_pooling_layer_may_be_missing_everywhere(bases, tuned, tmp_path):
    base = tuned("bert", "BertModel", add_pooling_layer=False)
    expert = tuned("bert", "BertForSequenceClassification")
    with seeded(2):
        model = transformers.BertModel.from_pretrained(base, add_pooling_layer=False)
        adapted = get_peft_model(model, LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"]))
        disturb(adapted, trainable_only=True, scale=0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merge([expert, tmp_path / "adapter"], tmp_path / "merged", base_model=base, **CPU)
    assert read_tensors(tmp_path / "merged").keys() == read_tensors(base).keys()
    loaded = AutoMergedModel.from_pretrained(tmp_path / "merged", head=expert.name)
    assert_same_bits(loaded.bert.pooler.dense.weight, read_tensors(expert)["bert.pooler.dense.weight"])


def test_a_part_of_the_pooling_layer_is_not_missing_by_design(bases, tuned):
    expert = tuned("bert", "BertModel")
    change_tensors(expert / "model.safetensors", lambda tensors: tensors.pop("pooler.dense.bias"))
    with pytest.raises(MergeError, match=r"lacks the parameter pooler\.dense\.bias, which its class BertModel has"):
        plan_merge([expert], base_model=bases["bert"])


def test_a_class_that_needs_its_pooling_layer_must_have_it(bases, tuned):
    expert = tuned("bert", "BertForSequenceClassification")
    change_tensors(expert / "model.safetensors", lambda it: [it.pop(f"bert.{name}") for name in POOLER])
    with pytest.raises(MergeError, match=r"bert\.pooler\.dense\.weight, which its class BertForSeq"):
        plan_merge([expert], base_model=bases["bert"])


@pytest.mark.parametrize(
    ("named", "said"),
    [(None, "names no class"), (["BertForPoems"], "names BertForPoems, which transformers does not know")],
)
def test_an_expert_that_names_no_class_is_told_to_name_one(bases, tuned, named, said):
    expert = tuned("bert-mlm", "BertModel", add_pooling_layer=False)
    change_json(expert / "config.json", architectures=named)
    with pytest.raises(MergeError) as error:
        plan_merge([expert], base_model=bases["bert-mlm"])
    assert says(str(error.value), "cls.predictions", said, "taken for a BertForMaskedLM", "name that class there")
