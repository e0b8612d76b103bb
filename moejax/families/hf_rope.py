"""Rotary positions in a Hugging Face config.json: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""

from __future__ import annotations

from typing import Any, get_args

from moejax.config import ModelConfig
from moejax.families.config_reader import ConfigReader
from moejax.rope_config import RopeScaling, RopeScalingName, attention_factor_of

_KINDS = tuple(name for name in get_args(RopeScalingName) if name != "none")
# Our names of the numbers that config.json has under others.
_NAMES = {"low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor"}


def read_rope(reader: ConfigReader) -> dict[str, Any]:
    """ModelConfig's rope_theta (default 1e6, that of both families' classes) and rope_scaling, from either spelling.

    Raises UserError, naming file and field, for a kind that is not computed and for values that it cannot have.
    """
    found: dict[str, ConfigReader] = {}
    for field in ("rope_scaling", "rope_parameters"):
        values = reader.values.get(field)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise reader.error(field, values, "an object with rope_type and rope_theta")
        found[field] = ConfigReader(values, f"{reader.where}: {field}")
        found[field].require("partial_rotary_factor", (1, 1.0), "partial rotation is not implemented")
        kind = _kind_of(found[field])
        if kind not in ("default", *_KINDS):
            raise reader.error(f"{field}.rope_type", kind, f"one of default, {', '.join(_KINDS)}: no other scaling is implemented")
    reader.require("partial_rotary_factor", (1, 1.0), "partial rotation is not implemented")
    theta = next((part for part in found.values() if part.values.get("rope_theta") is not None), reader).number("rope_theta", 1e6)
    scaled = next((part for part in found.values() if _kind_of(part) != "default"), None)
    return {"rope_theta": theta, "rope_scaling": RopeScaling() if scaled is None else _read_scaling(reader, scaled)}


def _kind_of(part: ConfigReader) -> Any:
    return part.values.get("rope_type", part.values.get("type", "default"))


def _read_scaling(reader: ConfigReader, part: ConfigReader) -> RopeScaling:
    kind = _kind_of(part)
    original = None
    if kind in ("yarn", "llama3"):  # the only ones that read it; beside rope_parameters, it comes before the one inside
        original = reader.optional_integer("original_max_position_embeddings")
        original = part.optional_integer("original_max_position_embeddings") if original is None else original
    if kind == "yarn" and part.values.get("factor") is None and original:
        factor = reader.integer("max_position_embeddings", original) / original
    else:
        factor = part.number("factor", 0.0)
    if factor < 1:
        raise part.error("factor", part.values.get("factor"), f"a number from 1 on, which rope_type {kind!r} needs")
    numbers: dict[str, Any] = {}
    if kind == "yarn":
        # 0 and null say the same to transformers: the default.
        numbers = {name: part.number(name, default) or default for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        numbers["truncate"] = part.boolean("truncate", True)
        mscale, over_all = part.number("mscale", 0.0), part.number("mscale_all_dim", 0.0)
        if part.values.get("attention_factor") is not None:
            numbers["attention_factor"] = part.number("attention_factor", 1.0)
        elif mscale and over_all:
            numbers["attention_factor"] = attention_factor_of(factor, mscale, over_all)
    if kind == "llama3":
        for name, theirs in _NAMES.items():
            if part.values.get(theirs) is None:
                raise part.error(theirs, None, "a number, which rope_type 'llama3' needs")
            numbers[name] = part.number(theirs, 1.0)
    return RopeScaling(kind, factor, original, **numbers)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_rope` reads, in the older spelling; every version of transformers reads it."""
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return {"rope_theta": config.rope_theta}
    # The kind stands under both of its names: transformers before 4.43 knows only "type".
    values: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.original_length is not None and scaling.kind != "dynamic":  # dynamic's is max_position_embeddings, and nothing else
        values["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        values |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    if scaling.kind == "llama3":
        values |= {theirs: getattr(scaling, name) for name, theirs in _NAMES.items()}
    return {"rope_theta": config.rope_theta, "rope_scaling": values}
