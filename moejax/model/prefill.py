"""Prompts of any length read into a cache in chunks of one size: one compiled program, and the memory of a chunk."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.model.cache import Cache
from moejax.model.moe import RouterOutputs
from moejax.model.transformer import Transformer, head_weight
from moejax.ops.matmul import project
from moejax.sharding import constrain


class ChunkOutputs(NamedTuple):
    """What a chunk gives beside the cache, on the device; the places past a row's end hold anything."""

    features: Float[Array, "B chunk D"]  # after the final norm: what the head reads
    routing: RouterOutputs | None  # MoE layers in front; None where it was not asked for


def prefill_in_chunks(
    model: Transformer,
    variables: Any,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, "B"],
    cache: Cache,
    chunk: int,
    visit: Callable[[int, ChunkOutputs], None] | None = None,
    return_routing: bool = False,
) -> tuple[Float[Array, "B V"], Any]:
    """Reads `lengths` tokens of each row of the prompts into the cache; logits after each row's last token, and the cache.

    What one pass gives, for every kind of cache. The cache is donated: use the one that comes back. `tokens` and `lengths` stay on the
    host, chunks go to the device one by one; rows that have ended take no more. A row of length 0 has zeros for logits.
    `visit(start, outputs)` sees every chunk's outputs, of the tokens from `start` on; `return_routing` puts the routing among them.
    """
    batch, time = tokens.shape
    shape = (batch, model.config.hidden_size)
    last = constrain(jnp.zeros(shape, model.config.dtype), model.mesh, None, None)
    if model.mesh is None:
        # Where the weights lie, as what comes back does: else the second chunk would be another program.
        last, cache = jax.device_put((last, cache), jax.tree.leaves(variables)[0].sharding)
    for start in range(0, min(time, int(lengths.max(initial=0))), chunk):
        part = np.zeros((batch, chunk), np.int32)
        part[:, : min(chunk, time - start)] = tokens[:, start : start + chunk]
        counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
        last, cache, outputs = read_chunk(model, visit is not None, return_routing, variables, part, counts, last, cache)
        if visit is not None:
            visit(start, outputs)
    return apply_head(model, variables, last), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(6, 7))
def read_chunk(
    model: Transformer, keep: bool, return_routing: bool, variables: Any, tokens: Array, counts: Array, last: Array, cache: Any
) -> tuple[Array, Any, Any]:
    """One chunk: the features of the newest token of every row, the old ones where it has none here, the cache, and what is kept."""
    mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]
    outputs = model.apply(variables, tokens, mask=mask, cache=cache, return_logits=False, return_routing=keep and return_routing)
    newest = outputs.features[jnp.arange(tokens.shape[0]), jnp.maximum(counts - 1, 0)]
    last = constrain(jnp.where((counts > 0)[:, None], newest, last), model.mesh, None, None)
    return last, outputs.cache, ChunkOutputs(outputs.features, outputs.routing) if keep else None


@functools.partial(jax.jit, static_argnums=0)
def apply_head(model: Transformer, variables: Any, features: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Logits of features, float32."""
    logits = project(features, head_weight(variables["params"]).astype(features.dtype)).astype(jnp.float32)
    return constrain(logits, model.mesh, *(None,) * logits.ndim)
