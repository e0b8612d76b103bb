"""Frequencies of the rotary positions: RoFormer's, and the ways to stretch them over longer texts, as transformers computes them.

Everything here is a constant of a compiled program: numpy, in float64 up to the last rounding.
"""

import functools
import math
from typing import NamedTuple

import numpy as np


class RotaryFrequencies(NamedTuple):
    """Radians a position for each pair of a head, float32 [H/2], and what cosines and sines are multiplied by."""

    radians: np.ndarray
    attention_factor: float = 1.0


@functools.lru_cache(maxsize=256)
def rotary_frequencies(
    head_width: int,
    theta: float,
    *,
    length: int = 0,
    kind: str = "none",
    factor: float = 1.0,
    original_length: int = 1,
    attention_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    low_frequency_factor: float = 1.0,
    high_frequency_factor: float = 4.0,
) -> RotaryFrequencies:
    """The frequencies of one kind of scaling; frequency i of none is theta^(-2i/H), i in 0..H/2-1 (RoFormer, Su et al. 2021).

    linear: all divided by `factor` (Chen et al. 2023). dynamic: theta grows with `length` past `original_length` (the NTK-aware rule).
    yarn: by turns within the original length, fast ones kept and slow ones divided, and `attention_factor` (Peng et al. 2023).
    llama3: the same idea by wavelengths. transformers' modeling_rope_utils.py is the reference for all four.
    """
    if kind == "dynamic":
        growth = factor * max(length, original_length) / original_length - (factor - 1.0)
        theta = theta * growth ** (head_width / (head_width - 2))
    plain = theta ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if kind in ("none", "dynamic"):
        radians = plain
    elif kind == "linear":
        radians = plain / factor
    elif kind == "yarn":
        low, high = (
            head_width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (beta_fast, beta_slow)
        )
        low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
        low, high = max(low, 0), min(high, head_width - 1)
        divided = np.clip((np.arange(head_width // 2) - low) / (high - low or 0.001), 0.0, 1.0)
        radians = plain / factor * divided + plain * (1.0 - divided)
    elif kind == "llama3":
        turns = original_length * plain / (2 * math.pi)
        kept = np.clip((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor), 0.0, 1.0)
        radians = plain / factor * (1.0 - kept) + plain * kept
    else:
        raise ValueError(f"rotary scaling {kind!r} is unknown; expected none, linear, dynamic, yarn or llama3")
    radians = radians.astype(np.float32)
    radians.flags.writeable = False  # it is shared by all who ask again
    return RotaryFrequencies(radians, attention_factor if kind == "yarn" else 1.0)
