"""Reads and writes the fields of a Hugging Face config.json that both families share, in the spelling of transformers 4 and of 5."""

from __future__ import annotations

from typing import Any

from moejax.config import ModelConfig, UserError
from moejax.families.config_reader import ConfigReader
from moejax.families.hf_rope import read_rope, write_rope

WIRING_FIELDS = (
    "family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_width", "num_experts",
    "experts_per_token", "max_length", "rope_theta", "rope_scaling", "norm_epsilon", "tie_embeddings", "initializer_range", "moe_every",
    "residual_mlp", "top_1_weight", "attention_window", "router_aux_loss_kind", "router_aux_loss_coefficient", "bos_token_id",
    "eos_token_ids",
)  # fmt: skip


def read_common(reader: ConfigReader) -> dict[str, Any]:
    """The ModelConfig fields that every family's config.json spells alike: rope, dtype, tokens, norms; refuses what is not computed."""
    for name, accepted, reason in (
        ("hidden_act", ("silu",), "no other activation is implemented"),
        ("attention_bias", (False,), "projections have no bias here"),
        ("mlp_bias", (False,), "projections have no bias here"),
        ("attention_dropout", (0, 0.0), "dropout is not implemented; set it to 0.0 to load the weights without it"),
        ("router_jitter_noise", (0, 0.0), "router jitter is not implemented; set it to 0.0 to load the weights without it"),
    ):
        reader.require(name, accepted, reason)
    dtype = _read_dtype(reader)
    return {
        **read_rope(reader),
        "tie_embeddings": reader.boolean("tie_word_embeddings", False),
        "initializer_range": reader.number("initializer_range", 0.02),
        "norm_epsilon": reader.number("rms_norm_eps", 1e-5),
        "dtype": dtype,
        "param_dtype": dtype,
        "bos_token_id": reader.integer("bos_token_id", 1) if reader.values.get("bos_token_id", 1) is not None else None,
        "eos_token_ids": _read_eos(reader),
    }


def _read_dtype(reader: ConfigReader) -> str:
    name = "dtype" if reader.values.get("dtype") is not None else "torch_dtype"
    value = reader.values.get(name) or "float32"
    dtype = str(value).removeprefix("torch.")
    if dtype == "float64":  # what tiny models are made in for tests; the weights' own dtype decides what is asked of the user
        return "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise reader.error(name, value, "'float32', 'bfloat16' or 'float16'")
    return dtype


def _read_eos(reader: ConfigReader) -> tuple[int, ...]:
    value = reader.values.get("eos_token_id", 2)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise reader.error("eos_token_id", value, "a token id, a list of them, or null")
    return tuple(ids)


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields that every family spells alike, in the older spelling, which every version of transformers reads."""
    eos = config.eos_token_ids
    return {
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "rms_norm_eps": config.norm_epsilon,
        **write_rope(config),
        "router_aux_loss_coef": config.router_aux_loss_coefficient,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def check_expressible(config: ModelConfig, read_back: ModelConfig, file: str = "config.json", unsaid: tuple[str, ...] = ()) -> None:
    """Raises UserError unless the `file` just written reads back as the same model; fields in `unsaid` have no place in it.

    The published format of a family cannot say everything a ModelConfig can (a Mixtral with a dense MLP beside its experts).
    """
    if config.router_bias:
        raise UserError(
            f"model.router_bias=True cannot be written as a {config.family} {file}: published formats have no place for the experts' "
            "biases, and without them tokens would go to other experts; keep the model as a checkpoint of moejax"
        )
    for name in (name for name in WIRING_FIELDS if name not in unsaid):
        ours, theirs = getattr(config, name), getattr(read_back, name)
        if ours != theirs:
            raise UserError(
                f"model.{name}={ours!r} cannot be written as a {config.family} {file}, which would read back as {theirs!r}; "
                "export is for models with the wiring of a published family"
            )
