"""The families that must merge, each with the smallest model that has all kinds of the family's parameters.

Slower tests run only over `families.FAMILIES`, which are stored or computed in unusual ways.
"""

from typing import Any

import torch
import transformers

import reference
from families import ATTENTION, CAUSAL, DECODER, ENCODER, ENCODER_AND_DECODER, FAMILIES, LABELS, TOKENS, Family, images
from reference import Neurons

LARGE_INIT: dict[str, Any] = {"initializer_range": 0.3}
"""With the default of 0.02, the output of so small a model hardly depends on most of its weights."""

SMALL: dict[str, Any] = {**DECODER, **LARGE_INIT, "num_hidden_layers": 1}
SMALL_ENCODER: dict[str, Any] = {
    **ENCODER,
    **LARGE_INIT,
    "num_hidden_layers": 1,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}
SEQ2SEQ: dict[str, Any] = {
    "init_std": 0.3,
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
TEXT_TOWER: dict[str, Any] = {**SMALL_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION_TOWER: dict[str, Any] = {**ENCODER, **LARGE_INIT, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
SPLIT_EXPERTS: dict[str, Neurons | None] = {"*.experts.*_proj": reference.FUSED_EXPERTS}
QUERY_VALUE: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}


def sound(*shape: int) -> torch.Tensor:
    return torch.linspace(0, 40, torch.Size(shape).numel()).sin().view(shape)


MORE_FAMILIES = {
    "mistral": Family(transformers.MistralConfig(**SMALL), transformers.MistralForCausalLM, TOKENS, CAUSAL),
    "qwen2": Family(transformers.Qwen2Config(**SMALL), transformers.Qwen2ForCausalLM, TOKENS, CAUSAL),
    "qwen3": Family(transformers.Qwen3Config(**SMALL), transformers.Qwen3ForCausalLM, TOKENS, CAUSAL),
    "gemma": Family(transformers.GemmaConfig(**SMALL), transformers.GemmaForCausalLM, TOKENS, CAUSAL),
    "phi": Family(transformers.PhiConfig(**SMALL), transformers.PhiForCausalLM, TOKENS, CAUSAL),
    "gpt-neox": Family(
        transformers.GPTNeoXConfig(
            **LARGE_INIT,
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        ),
        transformers.GPTNeoXForCausalLM,
        TOKENS,
        CAUSAL,
    ),
    "opt": Family(
        transformers.OPTConfig(
            init_std=0.3,
            vocab_size=40,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        ),
        transformers.OPTForCausalLM,
        TOKENS,
        CAUSAL,
    ),
    "qwen2-moe": Family(
        transformers.Qwen2MoeConfig(
            **SMALL,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        transformers.Qwen2MoeForCausalLM,
        TOKENS,
        ATTENTION,
        neurons=SPLIT_EXPERTS,
    ),
    "qwen3-moe": Family(
        transformers.Qwen3MoeConfig(**SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
        transformers.Qwen3MoeForCausalLM,
        TOKENS,
        ATTENTION,
        neurons=SPLIT_EXPERTS,
    ),
    "roberta": Family(
        transformers.RobertaConfig(**(SMALL_ENCODER | {"max_position_embeddings": 20}), **LABELS),
        transformers.RobertaForSequenceClassification,
        TOKENS,
        {"target_modules": ["query", "value"]},
    ),
    "distilbert": Family(
        transformers.DistilBertConfig(
            **LARGE_INIT,
            vocab_size=40,
            dim=16,
            hidden_dim=24,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=16,
            **LABELS,
        ),
        transformers.DistilBertForSequenceClassification,
        TOKENS,
        {"target_modules": ["q_lin", "v_lin"]},
    ),
    "deberta": Family(
        transformers.DebertaConfig(
            **SMALL_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0, **LABELS
        ),
        transformers.DebertaForSequenceClassification,
        TOKENS,
        {"target_modules": ["in_proj"]},
    ),
    "deberta-v2": Family(
        transformers.DebertaV2Config(
            **SMALL_ENCODER,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            type_vocab_size=0,
            **{**LABELS, "position_buckets": 4},
        ),
        transformers.DebertaV2ForSequenceClassification,
        TOKENS,
        {"target_modules": ["query_proj", "value_proj"]},
    ),
    "bart": Family(
        transformers.BartConfig(**SEQ2SEQ, max_position_embeddings=16),
        transformers.BartForConditionalGeneration,
        ENCODER_AND_DECODER,
        {"task_type": "SEQ_2_SEQ_LM", **QUERY_VALUE},
    ),
    "clip": Family(
        transformers.CLIPConfig(text_config=TEXT_TOWER, vision_config=VISION_TOWER, projection_dim=8),
        transformers.CLIPModel,
        TOKENS | images(8),
        QUERY_VALUE,
    ),
    "swin": Family(
        transformers.SwinConfig(
            **LARGE_INIT,
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            **LABELS,
        ),
        transformers.SwinForImageClassification,
        images(16),
        QUERY_VALUE,
    ),
    "convnext": Family(
        transformers.ConvNextConfig(
            **LARGE_INIT,
            layer_scale_init_value=1.0,
            image_size=16,
            patch_size=4,
            num_stages=2,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            **LABELS,
        ),
        transformers.ConvNextForImageClassification,
        images(16),
        {"target_modules": ["pwconv1", "pwconv2"]},
    ),
    "whisper": Family(
        transformers.WhisperConfig(
            **SEQ2SEQ, num_mel_bins=4, max_source_positions=8, max_target_positions=16, suppress_tokens=None
        ),
        transformers.WhisperForConditionalGeneration,
        {"input_features": sound(2, 4, 16), "decoder_input_ids": ENCODER_AND_DECODER["decoder_input_ids"]},
        QUERY_VALUE,
    ),
    "wav2vec2": Family(
        transformers.Wav2Vec2Config(
            **LARGE_INIT,
            vocab_size=40,
            **{key: value for key, value in ENCODER.items() if key != "num_hidden_layers"},
            num_hidden_layers=1,
            conv_dim=(8, 8),
            conv_stride=(4, 2),
            conv_kernel=(5, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        transformers.Wav2Vec2ForCTC,
        {"input_values": sound(2, 80)},
        QUERY_VALUE,
        neurons={"*.weight.original0": None, "*.masked_spec_embed": None},
    ),
    "llava": Family(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
            vision_config=transformers.CLIPVisionConfig(**VISION_TOWER),
            image_token_index=39,
            vision_feature_layer=-1,
        ),
        transformers.LlavaForConditionalGeneration,
        {"input_ids": torch.tensor([[1, 39, 39, 39, 39, 5, 6], [1, 39, 39, 39, 39, 7, 8]]), **images(8)},
        QUERY_VALUE,
        neurons={"*.class_embedding": None},
    ),
}

ALL_FAMILIES = FAMILIES | MORE_FAMILIES
