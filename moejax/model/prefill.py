"""Prompts of any length read into a cache in chunks of one size: one compiled program, and the memory of a chunk."""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.model.cache import Cache
from moejax.model.transformer import Transformer, head_weight
from moejax.ops.matmul import project
from moejax.sharding import constrain


def prefill_in_chunks(
    model: Transformer, variables: Any, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], cache: Cache, chunk: int
) -> tuple[Float[Array, "B V"], Any]:
    """Reads `lengths` tokens of each row of the prompts into the cache; logits after each row's last token, and the cache.

    What one pass gives, for every kind of cache. The cache is donated: use the one that comes back. `tokens` and `lengths` stay on the
    host, chunks go to the device one by one; rows that have ended take no more. A row of length 0 has zeros for logits.
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
        last, cache = read_chunk(model, variables, part, counts, last, cache)
    return _apply_head(model, variables, last), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def read_chunk(model: Transformer, variables: Any, tokens: Array, counts: Array, last: Array, cache: Any) -> tuple[Array, Any]:
    """One chunk: the features of the newest token of every row, the old ones where it has none here, and the cache."""
    mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]
    outputs = model.apply(variables, tokens, mask=mask, cache=cache, return_logits=False)
    newest = outputs.features[jnp.arange(tokens.shape[0]), jnp.maximum(counts - 1, 0)]
    return constrain(jnp.where((counts > 0)[:, None], newest, last), model.mesh, None, None), outputs.cache


@functools.partial(jax.jit, static_argnums=0)
def _apply_head(model: Transformer, variables: Any, features: Array) -> Array:
    head = head_weight(variables["params"]).astype(features.dtype)
    return constrain(project(features, head).astype(jnp.float32), model.mesh, None, None)
