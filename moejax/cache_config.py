"""The configuration's part on what generation keeps of the tokens it has read. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moejax.checks import UserError, require_choice, require_types

CacheName = Literal["full", "window", "sinks"]
CacheDTypeName = Literal["model", "int8"]


@dataclass(frozen=True)
class CacheConfig:
    """The kind of cache (docs/inference.md). Raises UserError for sizes that make none, and for a size that the kind does not read."""

    kind: CacheName = "full"  # full: every token; window: the last ones; sinks: the first ones, and the last
    sinks: int = 4  # sinks: first tokens that stay
    window: int | None = None  # window and sinks: last tokens that stay; None: what the model's attention sees, or its max_length in all
    dtype: CacheDTypeName = "model"  # int8: a byte a number and one scale a head vector, about a quarter of float32

    def __post_init__(self) -> None:
        require_types("cache", self)
        require_choice("cache", self, "kind", get_args(CacheName))
        require_choice("cache", self, "dtype", get_args(CacheDTypeName))
        if self.kind == "full" and self.window is not None:
            raise UserError(
                f"cache.window={self.window} says nothing to cache.kind='full'; leave it out, or set --cache.kind window or sinks"
            )
        if self.sinks < 0 or (self.window is not None and self.window < 1):
            raise UserError(
                f"cache.sinks={self.sinks} and cache.window={self.window} make no cache; sinks must be 0 or more, the window 1 or more"
            )
