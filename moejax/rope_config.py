"""The configuration's part on rotary positions past those that a model was trained with. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moejax.checks import UserError, require_choice, require_positive, require_types

RopeScalingName = Literal["none", "linear", "dynamic", "yarn", "llama3"]

# Which fields each kind reads, beside the model's rope_theta, head width and max_length.
READ_BY: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "yarn": ("factor", "original_length", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched, as transformers' `rope_parameters` define each kind (`moejax/ops/rope.py` computes them).

    Raises UserError for a kind without its factor, and for a field that the kind does not read.
    """

    kind: RopeScalingName = "none"
    factor: float | None = None  # how many times longer than original_length texts may be, about
    original_length: int | None = None  # positions the model was trained with; None: model.max_length
    attention_factor: float | None = None  # yarn: what cosines and sines are multiplied by; None: 0.1 ln(factor) + 1
    beta_fast: float = 32.0  # yarn: turns within original_length from which on a frequency is left as it is
    beta_slow: float = 1.0  # yarn: turns up to which it is divided by the factor
    truncate: bool = True  # yarn: the range between the two widened to whole dimensions
    low_frequency_factor: float = 1.0  # llama3: turns within original_length below which a frequency is divided by the factor
    high_frequency_factor: float = 4.0  # llama3: turns above which it is left as it is

    def __post_init__(self) -> None:
        section = "model.rope_scaling"
        require_types(section, self)
        require_choice(section, self, "kind", get_args(RopeScalingName))
        require_positive(
            section, self, "factor", "original_length", "attention_factor", "beta_fast", "beta_slow", "low_frequency_factor",
            "high_frequency_factor",
        )  # fmt: skip
        defaults = RopeScaling.__dataclass_fields__
        for name, default in ((name, defaults[name].default) for name in defaults if name != "kind"):
            if getattr(self, name) != default and name not in READ_BY[self.kind]:
                readers = ", ".join(kind for kind, names in READ_BY.items() if name in names)
                raise UserError(
                    f"{section}.{name}={getattr(self, name)!r} says nothing to {section}.kind={self.kind!r}; "
                    f"leave it out, or set --model.rope-scaling.kind to one of {readers}"
                )
        if self.kind != "none" and (self.factor is None or self.factor < 1):
            raise UserError(
                f"{section}.factor={self.factor!r} must be a number from 1 on for {section}.kind={self.kind!r}: how many times longer the "
                "texts become; set --model.rope-scaling.factor"
            )
        if self.beta_fast < self.beta_slow:
            raise UserError(f"{section}.beta_fast={self.beta_fast!r} must not be below {section}.beta_slow={self.beta_slow!r}")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise UserError(
                f"{section}.high_frequency_factor={self.high_frequency_factor!r} must be above "
                f"{section}.low_frequency_factor={self.low_frequency_factor!r}"
            )


def attention_factor_of(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's factor of cosines and sines where none is given, from published configs' `mscale` and `mscale_all_dim` if both are set."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if factor <= 1:
        return 1.0
    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
