"""A model with its rotary positions stretched in other ways than its checkpoint says, for evaluations to set side by side."""

from dataclasses import replace
from typing import get_args

from moejax.config import ModelConfig, UserError
from moejax.model.transformer import Transformer
from moejax.rope_config import READ_BY, RopeScaling, RopeScalingName

OWN = "checkpoint"  # the model as its checkpoint has it


def parse_scaling(text: str) -> RopeScaling | None:
    """`KIND:FACTOR`, as yarn:4, or `none`; None for `checkpoint`. Raises UserError for what is neither."""
    kind, colon, factor = text.partition(":")
    if text == OWN:
        return None
    if kind not in get_args(RopeScalingName) or (kind == "none") == bool(colon):
        kinds = ", ".join(f"{name}:FACTOR" for name in get_args(RopeScalingName) if name != "none")
        raise UserError(f"scalings has {text!r}; expected {OWN}, none, or one of {kinds}, as yarn:4")
    try:
        number = float(factor) if colon else None
    except ValueError as error:
        raise UserError(f"scalings has {text!r}; expected a number behind the colon, as yarn:4") from error
    return RopeScaling(kind, factor=number)  # pyright: ignore[reportArgumentType]  # the kind was looked up above


def scale_model(model: Transformer, scaling: RopeScaling | None, trained: int) -> Transformer:
    """The model with this scaling in the place of its own; None leaves it as it is. Its weights are those of the model.

    `trained`: the length it was trained with, unless its own scaling says what that was.
    """
    if scaling is None:
        return model
    if "original_length" in READ_BY[scaling.kind]:
        scaling = replace(scaling, original_length=original_length(model.config, trained))
    return Transformer(replace(model.config, rope_scaling=scaling), model.mesh)


def original_length(config: ModelConfig, trained: int) -> int:
    """The length before any scaling: what the configuration says, else the one trained with."""
    return config.rope_scaling.original_length or trained
