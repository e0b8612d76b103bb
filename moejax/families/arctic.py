"""Snowflake Arctic (480B): a dense residual MLP beside 128 experts that read the layer's input; or the plain wirings of its class.

Presets, the published config.json, and the names under which Hugging Face files keep the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.families.config_reader import ConfigReader
from moejax.families.family import Family, NameTable, Source
from moejax.families.hf_config import check_expressible, read_common, write_common

_WIRING: dict[str, Any] = {"family": "arctic", "top_1_weight": "probability", "router_aux_loss_kind": "per_layer"}

ARCTIC_480B = ModelConfig(
    **_WIRING,
    vocab_size=32_000,
    hidden_size=7168,
    intermediate_size=4864,
    num_layers=35,
    num_heads=56,
    num_kv_heads=8,  # the first upload had 56; importing goes by the tensors' shapes
    num_experts=128,
    experts_per_token=2,
    max_length=4096,
    rope_theta=10_000.0,
    norm_epsilon=1e-5,
    moe_every=1,
    residual_mlp=True,
    router_aux_loss_coefficient=0.001,
    dtype="bfloat16",
    param_dtype="bfloat16",
    bos_token_id=31_998,  # <|im_start|>
    eos_token_ids=(31_999,),  # <|im_end|>
)


def config_from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of an Arctic config.json; absent keys take the defaults of the reference's ArcticConfig.

    Those defaults are not the published model's: one expert per token, MoE in every second layer, no residual MLP. Capacities and token
    dropping of the DeepSpeed path are kept for dispatch capacity, the factor of training alone; the dispatch stays auto, which drops
    nothing, as the reference's plain path. `sink_size` is read by no reference code. Raises UserError, naming `where` and the field,
    for wrong types and for what the forward pass does not compute.
    """
    reader = ConfigReader(values, where)
    if reader.boolean("moe_token_dropping", True):  # without dropping, DeepSpeed's path computes what the plain one does
        why = "a loaded model drops no token, as the plain path; set it, or moe_token_dropping, to false to load the weights so"
        reader.require("use_deepspeed_moe_implementation", (False,), why)
    reader.require("quantization", (), "quantising at run time is not implemented; set it to null to load the weights as they are")
    heads = reader.integer("num_attention_heads", 32)
    hidden_size = reader.integer("hidden_size", 4096)
    reader.require("head_dim", (hidden_size // heads if heads > 0 else 0,), "Arctic's heads are hidden_size / num_attention_heads wide")
    window = reader.optional_integer("sliding_window")
    if window is not None and window < 1:
        raise reader.error("sliding_window", window, "a number above 0, or null")
    # vLLM reads use_residual where the reference reads parallel_attn_mlp_res; published files carry both, equal.
    parallel = reader.boolean("parallel_attn_mlp_res", reader.boolean("use_residual", False))
    return ModelConfig(
        **_WIRING,
        **read_common(reader),
        vocab_size=reader.integer("vocab_size", 32_000),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size", 14_336),
        num_layers=reader.integer("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        num_experts=reader.integer("num_local_experts", 8),
        experts_per_token=reader.integer("num_experts_per_tok", 1),
        max_length=reader.integer("max_position_embeddings", 4096),
        moe_every=reader.integer("moe_layer_frequency", 2),
        residual_mlp=parallel,
        # The reference's eager attention sees 0 <= i - j <= W: one key more than Mixtral's window of the same number.
        attention_window=None if window is None else window + 1,
        router_aux_loss_coefficient=reader.number("router_aux_loss_coef", 0.001),
        capacity_factor=reader.number("moe_train_capacity_factor", 1.0),
        min_capacity=reader.integer("moe_min_capacity", 0),
        drop_tokens=reader.boolean("moe_token_dropping", True),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that the reference loads as this model. Raises UserError for wiring that Arctic does not have."""
    values = write_common(config) | {
        "architectures": ["ArcticForCausalLM"],
        "model_type": "arctic",
        "moe_eval_capacity_factor": config.capacity_factor,
        "moe_layer_frequency": config.moe_every,
        "moe_min_capacity": config.min_capacity,
        "moe_token_dropping": config.drop_tokens,
        "moe_train_capacity_factor": config.capacity_factor,
        "parallel_attn_mlp_res": config.residual_mlp,
        "sliding_window": None if config.attention_window is None else config.attention_window - 1,
        "use_residual": config.residual_mlp,
    }
    check_expressible(config, config_from_hf(values, "config.json"))
    return values


_LAYER = "model.layers.{l}."

CLASSIC = NameTable(
    "Hugging Face",
    {
        "embed/embedding": Source("model.embed_tokens.weight"),
        "final_norm/scale": Source("model.norm.weight"),
        "head/kernel": Source("lm_head.weight"),
        "attention_norm/scale": Source(_LAYER + "input_layernorm.weight"),
        "attention/query/kernel": Source(_LAYER + "self_attn.q_proj.weight"),
        "attention/key/kernel": Source(_LAYER + "self_attn.k_proj.weight"),
        "attention/value/kernel": Source(_LAYER + "self_attn.v_proj.weight"),
        "attention/out/kernel": Source(_LAYER + "self_attn.o_proj.weight"),
        "moe_norm/scale": Source(_LAYER + "post_attention_layernorm.weight"),
        "moe/router/kernel": Source(_LAYER + "block_sparse_moe.gate.weight"),
        "moe/gate/kernel": Source(_LAYER + "block_sparse_moe.experts.{e}.w1.weight"),
        "moe/up/kernel": Source(_LAYER + "block_sparse_moe.experts.{e}.w3.weight"),
        "moe/down/kernel": Source(_LAYER + "block_sparse_moe.experts.{e}.w2.weight"),
        "residual_norm/scale": Source(_LAYER + "residual_layernorm.weight"),
        "residual/gate/kernel": Source(_LAYER + "residual_mlp.w1.weight"),
        "residual/up/kernel": Source(_LAYER + "residual_mlp.w3.weight"),
        "residual/down/kernel": Source(_LAYER + "residual_mlp.w2.weight"),
        "mlp_norm/scale": Source(_LAYER + "post_attention_layernorm.weight"),
        "mlp/gate/kernel": Source(_LAYER + "block_sparse_moe.mlp.w1.weight"),
        "mlp/up/kernel": Source(_LAYER + "block_sparse_moe.mlp.w3.weight"),
        "mlp/down/kernel": Source(_LAYER + "block_sparse_moe.mlp.w2.weight"),
    },
)

# The names of models saved while they ran through DeepSpeed's MoE layer, all experts in one process.
DEEPSPEED = NameTable(
    "Hugging Face, DeepSpeed experts",
    dict(CLASSIC.sources)
    | {
        "moe/router/kernel": Source(_LAYER + "block_sparse_moe.mlp.deepspeed_moe.gate.wg.weight"),
        "moe/gate/kernel": Source(_LAYER + "block_sparse_moe.mlp.deepspeed_moe.experts.deepspeed_experts.{e}.w1.weight"),
        "moe/up/kernel": Source(_LAYER + "block_sparse_moe.mlp.deepspeed_moe.experts.deepspeed_experts.{e}.w3.weight"),
        "moe/down/kernel": Source(_LAYER + "block_sparse_moe.mlp.deepspeed_moe.experts.deepspeed_experts.{e}.w2.weight"),
    },
)

ARCTIC = Family(
    name="arctic",
    architecture="ArcticForCausalLM",
    presets={"arctic_480b": ARCTIC_480B},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tables=(CLASSIC, DEEPSPEED),
)
