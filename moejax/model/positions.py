"""Rotary frequencies of a model: its configuration's scaling, told to `ops.rope` in numbers."""

from moejax.config import ModelConfig
from moejax.ops.rope import RotaryFrequencies, rotary_frequencies
from moejax.rope_config import READ_BY, attention_factor_of


def model_frequencies(config: ModelConfig, length: int) -> RotaryFrequencies:
    """The frequencies of `config` for rows of up to `length` positions, which only dynamic scaling looks at.

    Shapes are static, so `length` is that of the program: the row's, or the slots of the cache. Keys and queries of a row always
    have the same frequencies; transformers, which follows the longest row of the batch as it grows, leaves older keys behind.
    """
    scaling = config.rope_scaling
    values = {name: getattr(scaling, name) for name in READ_BY[scaling.kind]}
    if "original_length" in values:
        values["original_length"] = scaling.original_length or config.max_length
    if "attention_factor" in values and scaling.attention_factor is None:
        values["attention_factor"] = attention_factor_of(float(scaling.factor or 1.0))
    length = length if scaling.kind == "dynamic" else 0
    return rotary_frequencies(config.head_width, config.rope_theta, kind=scaling.kind, length=length, **values)
