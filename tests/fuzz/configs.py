"""Configurations that are damaged, wrong or odd: a merge refuses them, or its folder loads in transformers.

A case changes the configuration, the generation settings, the adapter's or the tokenizer's of one of the models, plans
the merge of a base and two experts, and carries it out and loads the result if the plan finds nothing.
"""

import functools
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers import AutoConfig

import loopback_environment
from campaign import Case, Outcome
from mutations import Hung, limited, mutate, spoil, write_json
from neuromerge_hf import MergeError, merge, plan_merge
from neuromerge_hf.methods.average import AverageConfig
from neuromerge_hf.skeleton import model_class_of
from tiny_models import save_adapter, save_bert, save_fine_tune, save_llama, save_tokenizer, seeded

POOLING = "1_Pooling/config.json"

FILES = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json", "modules.json", POOLING,
)  # fmt: skip

MODEL_KEYS = (
    "architectures", "auto_map", "quantization_config", "rope_scaling", "rope_parameters", "rope_theta",
    "num_labels", "id2label",
    "label2id", "dtype", "torch_dtype", "model_type", "tie_word_embeddings", "layer_types", "text_config",
    "vocab_size",
    "transformers_version", "is_encoder_decoder", "problem_type", "_name_or_path",
    "pad_token_id",
    "eos_token_id", "name_or_path", "sub_configs", "attribute_map", "use_cache", "output_attentions",
    "base_model_tp_plan",
    "generation_config", "max_length", "num_experts", "sliding_window", "tokenizer_class", "__class__",
    "keys_to_ignore",
)  # fmt: skip

ADAPTER_KEYS = (
    "peft_version", "revision", "task_type", "alpha_pattern", "rank_pattern", "modules_to_save", "layers_to_transform",
    "layers_pattern", "exclude_modules", "target_parameters", "use_rslora", "use_dora", "lora_bias",
    "init_lora_weights",
    "eva_config", "corda_config", "layer_replication", "trainable_token_indices", "megatron_config", "bias",
    "auto_mapping",
    "fan_in_fan_out", "peft_type", "r", "lora_alpha", "target_modules", "arrow_config", "loftq_config",
    "token_indices",
)  # fmt: skip

SLOW = 20
"""The seconds from which a case is a defect."""


def _save_other(model_class: str, folder: Path, **settings: object) -> Path:
    with seeded(0):
        chosen = getattr(transformers, model_class)
        chosen(chosen.config_class(**settings)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": save_llama,
    "bert": lambda folder: save_bert(folder, "BertForMaskedLM"),
    "gpt2": lambda folder: _save_other(
        "GPT2LMHeadModel", folder, vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16
    ),
    "t5": lambda folder: _save_other(
        "T5ForConditionalGeneration", folder, vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    ),
    "mixtral": lambda folder: _save_other(
        "MixtralForCausalLM", folder, vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    ),
    "vit": lambda folder: _save_other(
        "ViTForImageClassification", folder, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, image_size=8, patch_size=4,
    ),
    "clip": lambda folder: _save_other(
        "CLIPModel", folder, projection_dim=8,
        text_config={"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 8, "patch_size": 4},
    ),
}  # fmt: skip

ADAPTERS: dict[str, dict[str, object]] = {
    "lora": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
}


@functools.cache
def _family(name: str) -> Path:
    root = Path(tempfile.mkdtemp(prefix="neuromerge-configs-")) / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = FAMILIES[name](root / "base")
        save_fine_tune(base, root / "expert", seed=1)
        save_tokenizer(root / "expert")
        if name == "bert":
            for model in (base, root / "expert"):
                _add_modules(model)
        if name == "llama":
            for number, (adapter, options) in enumerate(ADAPTERS.items()):
                save_adapter(base, root / adapter, seed=number, **options)
    return root


def _add_modules(model: Path) -> None:
    """Make a model a SentenceTransformer."""
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()]
    write_json(model / "modules.json", listed)
    (model / POOLING).parent.mkdir()
    write_json(model / POOLING, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})


def try_case(seed: int, folder: Path) -> Case:
    """Change one file of one of the models of a family."""
    loopback_environment.start()
    transformers.logging.set_verbosity_error()
    rng = random.Random(seed)
    family = _family("llama" if rng.random() < 0.5 else rng.choice(list(FAMILIES)))
    names = [path.name for path in sorted(family.iterdir())]
    experts = sorted(set(names) - {"base"} - set(rng.sample(names, max(0, len(names) - 3))))
    experts = experts or ["expert"]
    for name in ("base", *experts):
        shutil.copytree(family / name, folder / name)
    victim = folder / rng.choice(["base", *experts])
    path = victim / rng.choice([name for name in FILES if (victim / name).is_file()])
    if rng.random() < 0.12:
        done = spoil(path, rng)
    else:
        content = json.loads(path.read_text())
        keys = ADAPTER_KEYS if path.name.startswith("adapter") else MODEL_KEYS if path.name == "config.json" else ()
        content, done = mutate(content, rng, keys)
        if rng.random() < 0.2:
            content, more = mutate(content, rng, keys)
            done += f", {more}"
        write_json(path, content)
    if rng.random() < 0.15:  # so that tokens are aligned
        _add_token(folder / experts[0])
    what = f"{family.name} {victim.name}/{path.name}: {done}"
    return _tried(seed, folder, experts, victim, what)


def _add_token(expert: Path) -> None:
    file = expert / "tokenizer.json"
    if file.is_file():
        content = json.loads(file.read_text())
        content["model"]["vocab"]["new"] = len(content["model"]["vocab"])
        write_json(file, content)


def _tried(seed: int, folder: Path, experts: list[str], victim: Path, what: str) -> Case:
    models = [folder / name for name in experts]
    try:
        with limited(SLOW), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan_merge(models, base_model=folder / "base")
            merge(models, folder / "merged", base_model=folder / "base", config=AverageConfig(), threads=1)
            problem = not_loaded(folder / "merged", folder / "base")
    except MergeError as error:
        if str(victim) not in str(error):
            return Case(seed, Outcome.WRONG, f"{what}: the file is not named: {error}")
        return Case(seed, Outcome.REFUSED, f"{what}: {error}")
    except Hung as error:
        return Case(seed, Outcome.WRONG, f"{what}: {error}")
    except Exception as error:
        return Case(seed, Outcome.TRACEBACK, f"{what}: {type(error).__name__}: {error}")
    return Case(seed, Outcome.WRONG if problem else Outcome.CORRECT, f"{what}: {problem}")


def not_loaded(folder: Path, base: Path | None = None) -> str:
    """Why transformers does not load a folder; empty if it does.

    Args:
        base: a folder with the same class, which may lack parameters that its files have.
    """
    try:
        model_class = model_class_of(AutoConfig.from_pretrained(folder), folder)
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        return f"the merge does not load: {type(error).__name__}: {error}"
    wrong = {name: found for name, found in info.items() if found}
    if base and wrong:  # the configuration may name a class without the head that the files have
        _, theirs = model_class.from_pretrained(base, output_loading_info=True)
        wrong = {} if theirs == info else wrong
    return f"the merge does not load: {wrong}" if wrong else ""
