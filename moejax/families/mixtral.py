"""Mixtral (8x7B, 8x22B): every layer an MoE layer, top-k weights renormalised, nothing beside the experts.

Presets, the published config.json, and the names under which Hugging Face files keep the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.families.family import Family, NameTable, Source
from moejax.families.hf_config import ConfigReader, check_expressible, read_common, write_common

_WIRING: dict[str, Any] = {
    "family": "mixtral",
    "moe_every": 1,
    "residual_mlp": False,
    "top_1_weight": "one",
    "router_aux_loss_kind": "pooled",
}

MIXTRAL_8X7B = ModelConfig(
    **_WIRING,
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    num_experts=8,
    experts_per_token=2,
    max_length=32_768,
    rope_theta=1e6,
    norm_epsilon=1e-5,
    router_aux_loss_coefficient=0.02,
    dtype="bfloat16",
    param_dtype="bfloat16",
)

# The vocabulary of 8x22B v0.3 and of Instruct v0.1; the v0.1 base model has 32,000.
MIXTRAL_8X22B = dataclasses.replace(
    MIXTRAL_8X7B,
    vocab_size=32_768,
    hidden_size=6144,
    intermediate_size=16_384,
    num_layers=56,
    num_heads=48,
    max_length=65_536,
    router_aux_loss_coefficient=0.001,
)


def config_from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of a Mixtral config.json, both spellings; absent keys take the defaults of transformers' MixtralConfig.

    Raises UserError, naming `where` and the field, for wrong types and for anything the forward pass does not compute.
    """
    reader = ConfigReader(values, where)
    heads = reader.integer("num_attention_heads", 32)
    # Absent is the class default, 8; null means one kv head per head.
    kv_heads = reader.integer("num_key_value_heads", heads if "num_key_value_heads" in values else 8)
    return ModelConfig(
        **_WIRING,
        **read_common(reader),
        vocab_size=reader.integer("vocab_size", 32_000),
        hidden_size=reader.integer("hidden_size", 4096),
        intermediate_size=reader.integer("intermediate_size", 14_336),
        num_layers=reader.integer("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=reader.optional_integer("head_dim"),
        num_experts=reader.integer("num_local_experts", 8),
        experts_per_token=reader.integer("num_experts_per_tok", 2),
        max_length=reader.integer("max_position_embeddings", 131_072),
        attention_window=reader.optional_integer("sliding_window"),
        router_aux_loss_coefficient=reader.number("router_aux_loss_coef", 0.001),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers loads as this model. Raises UserError for wiring that Mixtral does not have."""
    values = write_common(config) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "output_router_logits": False,
        "sliding_window": config.attention_window,
    }
    if config.head_size is not None:
        values["head_dim"] = config.head_size
    check_expressible(config, config_from_hf(values, "config.json"))
    return values


_LAYER = "model.layers.{l}."
_SHARED = {
    "embed/embedding": Source("model.embed_tokens.weight"),
    "final_norm/scale": Source("model.norm.weight"),
    "head/kernel": Source("lm_head.weight"),
    "attention_norm/scale": Source(_LAYER + "input_layernorm.weight"),
    "attention/query/kernel": Source(_LAYER + "self_attn.q_proj.weight"),
    "attention/key/kernel": Source(_LAYER + "self_attn.k_proj.weight"),
    "attention/value/kernel": Source(_LAYER + "self_attn.v_proj.weight"),
    "attention/out/kernel": Source(_LAYER + "self_attn.o_proj.weight"),
    "moe_norm/scale": Source(_LAYER + "post_attention_layernorm.weight"),
}

CLASSIC = NameTable(
    "Hugging Face",
    _SHARED
    | {
        "moe/router/kernel": Source(_LAYER + "block_sparse_moe.gate.weight"),
        "moe/gate/kernel": Source(_LAYER + "block_sparse_moe.experts.{e}.w1.weight"),
        "moe/up/kernel": Source(_LAYER + "block_sparse_moe.experts.{e}.w3.weight"),
        "moe/down/kernel": Source(_LAYER + "block_sparse_moe.experts.{e}.w2.weight"),
    },
)

# The names that transformers 5 has in memory, met in files that were not written by save_pretrained.
FUSED = NameTable(
    "Hugging Face, fused experts",
    _SHARED
    | {
        "moe/router/kernel": Source(_LAYER + "mlp.gate.weight"),
        "moe/gate/kernel": Source(_LAYER + "mlp.experts.gate_up_proj", part=0, parts=2),
        "moe/up/kernel": Source(_LAYER + "mlp.experts.gate_up_proj", part=1, parts=2),
        "moe/down/kernel": Source(_LAYER + "mlp.experts.down_proj"),
    },
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    presets={"mixtral_8x7b": MIXTRAL_8X7B, "mixtral_8x22b": MIXTRAL_8X22B},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tables=(CLASSIC, FUSED),
)
