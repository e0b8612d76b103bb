"""Who sees whom in attention: a description, small and the same for every layer, from which masks are made where they are needed.

A mask [B, T, S] of a long row is as large as the scores it hides; blocks of it, made beside the scores, cost next to nothing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Int

FAR = jnp.iinfo(jnp.int32).max // 2  # the place of a key that nobody sees


class Indices(NamedTuple):
    """Places of queries or keys in the row (or the cache): not rotary positions, which restart in every packed document."""

    index: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None  # packed document of each; 0 is padding
    real: Bool[Array, "B T"] | None = None  # False is padding, which nobody sees; for keys alone


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("queries", "keys", "blind"), meta_fields=("window", "num_keys", "whole_rows")
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """A query sees the keys at or before it, within the window, of its own segment, that are real."""

    queries: Indices
    keys: Indices
    blind: Bool[Array, "B T"] | None = None  # queries that see no key at all; None where there can be none
    window: int | None = None  # keys seen, the query's own included
    num_keys: int | None = None  # keys from here on only fill up a mesh; None is all of them
    whole_rows: bool = False  # queries and keys are the row's positions 0, 1, ..., in this order: no cache, nothing left out


def describe_visibility(
    queries: Indices, keys: Indices, window: int | None = None, num_keys: int | None = None, whole_rows: bool = False
) -> Visibility:
    """The Visibility of these queries and keys. Only a mask of padding can leave a query without any key; they are found here, once."""
    seen = Visibility(queries, keys, None, window, num_keys, whole_rows)
    if keys.real is None:
        return seen
    return dataclasses.replace(seen, blind=~jnp.any(visible_keys(seen), axis=-1))


def visible_keys(visibility: Visibility) -> Bool[Array, "B T S"]:
    """The whole mask: True where the query (T) sees the key (S)."""
    return visible_pairs(visibility.queries, visibility.keys, visibility.window)


def visible_pairs(queries: Indices, keys: Indices, window: int | None) -> Bool[Array, "B T S"]:
    """The mask of these queries and keys, which may be blocks of all."""
    distance = queries.index[:, :, None] - keys.index[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if keys.real is not None:
        visible &= keys.real[:, None, :]
    if queries.segments is not None and keys.segments is not None:
        visible &= queries.segments[:, :, None] == keys.segments[:, None, :]
    return visible
