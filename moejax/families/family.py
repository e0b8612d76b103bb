"""What a model family is: its presets, how its published configurations read, and where its published files keep each weight.

A family is data and two functions. Its wiring (what the forward pass does) is fields of ModelConfig, which `config_from_hf` fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moejax.config import ModelConfig

# "transposed": columns are rows. "rotary": the rows of each head pair (2i, 2i + 1) for the rotary embedding, where the tree pairs
# (i, i + head width / 2): row h * width + 2i + s there is row h * width + s * width / 2 + i here.
Transform = Literal["transposed", "rotary"]


@dataclass(frozen=True)
class Source:
    """Where one leaf of one layer lies in a published checkpoint.

    `key` is a pattern with `{l}` for the layer and, where each expert has its own tensor, `{e}`. A tensor without `{e}` that
    holds an expert leaf has the experts as its first axis, or (`flat`) one below the other in its rows. Where it holds several
    leaves, each is one of `parts` equal runs of rows, and `part` says which. `transform` says how the numbers of one matrix lie
    otherwise than in the tree; `moejax.checkpoint.names` applies it, in both directions.
    """

    key: str
    part: int = 0
    parts: int = 1
    flat: bool = False
    transform: Transform | None = None


@dataclass(frozen=True)
class NameTable:
    """One published layout: each leaf of the tree (`outer_leaves` and `block_leaves` of layout.py) -> its source."""

    name: str
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class Family:
    """One model family. `tables` are the layouts that can be read; the first is what is written as Hugging Face's, `original` as Mistral's.

    The two functions with "original" in their names are None where the family was never published in Mistral's own layout.
    """

    name: str  # ModelConfig.family, and `model_type` of a Hugging Face config
    architecture: str  # the class that `architectures` of a Hugging Face config names
    presets: Mapping[str, ModelConfig]
    config_from_hf: Callable[[Mapping[str, Any], str], ModelConfig]  # (values, where they were read)
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    tables: tuple[NameTable, ...]
    original: NameTable | None = None
    config_from_original: Callable[[Mapping[str, Any], str], ModelConfig] | None = None  # values of params.json
    config_to_original: Callable[[ModelConfig], dict[str, Any]] | None = None
