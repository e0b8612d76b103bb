"""Mixtral (8x7B, 8x22B): every layer an MoE layer, top-k weights renormalised, nothing beside the experts.

Presets, the published config.json and params.json, and the names under which Hugging Face's and Mistral's files keep the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig, UserError
from moejax.families.config_reader import ConfigReader
from moejax.families.family import Family, NameTable, Source
from moejax.families.hf_config import check_expressible, read_common, write_common

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


# What params.json has no word for: none of it changes what the weights compute. Tokenizers say which tokens begin and end a text.
_UNSAID = ("initializer_range", "router_aux_loss_coefficient", "bos_token_id", "eos_token_ids")
# The first release named the fields as Hugging Face does.
_FIRST_RELEASE = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
}
_READ_OR_IGNORED = {
    "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "moe", "rope_theta",
    "sliding_window", "_sliding_window", "max_seq_len", "max_position_embeddings", "model_type", "max_batch_size",
}  # fmt: skip


def config_from_original(values: Mapping[str, Any], where: str = "params.json") -> ModelConfig:
    """The ModelConfig of a Mixtral params.json, that of mistral-inference or of the first release.

    rope_theta absent is 1e6, as in mistral-inference; the first release's names come with another default in the only script that
    reads them, so there it must be said. The longest text is not in the file unless as max_seq_len: it is the preset's of the same
    size. Raises UserError, naming `where` and the field, for wrong types and for anything the forward pass does not compute.
    """
    if "hidden_size" in values and "dim" not in values:
        values = _rename_first_release(values, where)
    reader = ConfigReader(values, where)
    reader.require("vision_encoder", (), "images are not read; use the checkpoint of a text model")
    reader.require("lora", (), "an adapter that is not merged yet is not read from the model's own file; merge it, or use the base model")
    reader.require("model_type", ("transformer",), "no other architecture of Mistral is implemented")
    for name in values.keys() - _READ_OR_IGNORED - {"vision_encoder", "lora"}:
        reader.require(name, (False,), "moejax does not know this field of params.json; use a Mixtral checkpoint, or update moejax")
    moe = values.get("moe")
    if not isinstance(moe, dict):
        raise reader.error("moe", moe, "an object with num_experts and num_experts_per_tok: a dense Mistral is not implemented")
    moe_reader = ConfigReader(moe, f"{where}: moe")
    heads, hidden_size, layers = (reader.integer(name, None) for name in ("n_heads", "dim", "n_layers"))
    is_8x22b = (hidden_size, layers) == (MIXTRAL_8X22B.hidden_size, MIXTRAL_8X22B.num_layers)
    longest = (MIXTRAL_8X22B if is_8x22b else MIXTRAL_8X7B).max_length
    return ModelConfig(
        **_WIRING,
        vocab_size=reader.integer("vocab_size", None),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("hidden_dim", None),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=reader.integer("n_kv_heads", heads),
        head_size=reader.optional_integer("head_dim"),
        num_experts=moe_reader.integer("num_experts", None),
        experts_per_token=moe_reader.integer("num_experts_per_tok", None),
        max_length=reader.integer("max_seq_len", reader.integer("max_position_embeddings", longest)),
        rope_theta=reader.number("rope_theta", 1e6),
        norm_epsilon=reader.number("norm_eps", 1e-5),
        attention_window=_read_window(reader, layers),
        router_aux_loss_coefficient=(MIXTRAL_8X22B if is_8x22b else MIXTRAL_8X7B).router_aux_loss_coefficient,
    )


def _rename_first_release(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a first release's params.json under the names of mistral-inference."""
    if values.get("rope_theta") is None:
        raise UserError(
            f"{where}: rope_theta is missing, and files with these field names are read with different defaults elsewhere; "
            "write the model's own into the file (Mixtral 8x7B: 1000000.0)"
        )
    experts = {"num_experts": values.get("num_local_experts"), "num_experts_per_tok": values.get("num_experts_per_tok")}
    rest = {name: value for name, value in values.items() if name not in ("num_local_experts", "num_experts_per_tok")}
    return {_FIRST_RELEASE.get(name, name): value for name, value in rest.items()} | {"moe": experts}


def _read_window(reader: ConfigReader, layers: int) -> int | None:
    """The window of every layer: one number, or a list that the layers take in turn and that must come to one number here."""
    name = "sliding_window" if reader.values.get("sliding_window") is not None else "_sliding_window"
    value = reader.values.get(name)
    if not isinstance(value, list):
        return reader.optional_integer(name)
    if len(set(value[:layers])) != 1:
        raise reader.error(name, value, "one window for all layers: layers that see differently far are not implemented")
    return ConfigReader({name: value[0]}, reader.where).optional_integer(name)


def config_to_original(config: ModelConfig) -> dict[str, Any]:
    """A params.json that mistral-inference reads as this model. Raises UserError for what Mixtral or that file does not have."""
    values: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "head_dim": config.head_width,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_epsilon,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_length,
        "moe": {"num_experts_per_tok": config.experts_per_token, "num_experts": config.num_experts},
    }
    if config.attention_window is not None:
        values["sliding_window"] = config.attention_window
    check_expressible(config, config_from_original(values), "params.json", _UNSAID)
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

_ORIGINAL_SHARED = {
    "embed/embedding": Source("tok_embeddings.weight"),
    "final_norm/scale": Source("norm.weight"),
    "head/kernel": Source("output.weight"),
    "attention_norm/scale": Source("layers.{l}.attention_norm.weight"),
    "attention/query/kernel": Source("layers.{l}.attention.wq.weight", transform="rotary"),
    "attention/key/kernel": Source("layers.{l}.attention.wk.weight", transform="rotary"),
    "attention/value/kernel": Source("layers.{l}.attention.wv.weight"),
    "attention/out/kernel": Source("layers.{l}.attention.wo.weight"),
    "moe_norm/scale": Source("layers.{l}.ffn_norm.weight"),
}

# mistral-inference: consolidated.safetensors, consolidated.00.pth.
ORIGINAL = NameTable(
    "Mistral",
    _ORIGINAL_SHARED
    | {
        "moe/router/kernel": Source("layers.{l}.feed_forward.gate.weight"),
        "moe/gate/kernel": Source("layers.{l}.feed_forward.experts.{e}.w1.weight"),
        "moe/up/kernel": Source("layers.{l}.feed_forward.experts.{e}.w3.weight"),
        "moe/down/kernel": Source("layers.{l}.feed_forward.experts.{e}.w2.weight"),
    },
)

# The first release, consolidated.00.pt to consolidated.07.pt: all experts in one matrix, and w2 of each transposed.
FIRST_RELEASE = NameTable(
    "Mistral, first release",
    _ORIGINAL_SHARED
    | {
        "moe/router/kernel": Source("layers.{l}.block_sparse_moe.gate.weight"),
        "moe/gate/kernel": Source("layers.{l}.block_sparse_moe.w1", flat=True),
        "moe/up/kernel": Source("layers.{l}.block_sparse_moe.w3", flat=True),
        "moe/down/kernel": Source("layers.{l}.block_sparse_moe.w2", flat=True, transform="transposed"),
    },
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    presets={"mixtral_8x7b": MIXTRAL_8X7B, "mixtral_8x22b": MIXTRAL_8X22B},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tables=(CLASSIC, FUSED, ORIGINAL, FIRST_RELEASE),
    original=ORIGINAL,
    config_from_original=config_from_original,
    config_to_original=config_to_original,
)
