"""Losses of long rows, read in chunks of one size: one compiled program a length, and the memory of a chunk beside the cache."""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.model.cache import Cache, create_cache
from moejax.model.transformer import Transformer, head_weight
from moejax.training.head_loss import head_token_losses


def score_rows(
    model: Transformer, variables: Any, tokens: Int[np.ndarray, "B T"], targets: Int[np.ndarray, "B T"], chunk: int
) -> Float[np.ndarray, "B T"]:
    """-log p of each target in nats, given the tokens of its row up to its place: what one pass over rows of T tokens gives.

    Dynamic scaling goes by T, as in that pass: the cache has T slots.
    """
    batch, time = tokens.shape
    chunk = min(chunk, time)
    cache = create_cache(model.config, batch, time, model.mesh)
    losses = []
    for start in range(0, time, chunk):
        count = min(chunk, time - start)
        part, wanted = (np.pad(ids[:, start : start + count], ((0, 0), (0, chunk - count))) for ids in (tokens, targets))
        loss, cache = score_chunk(model, variables, part, wanted, cache, np.full(batch, count, np.int32))
        losses.append(loss)
    return np.concatenate(jax.device_get(losses), axis=1)[:, :time]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def score_chunk(
    model: Transformer, variables: Any, tokens: Int[Array, "B C"], targets: Int[Array, "B C"], cache: Cache, counts: Int[Array, "B"]
) -> tuple[Float[Array, "B C"], Cache]:
    """The losses of the first `counts` targets of each row, others being anything, under a model that has read the cache; and the cache."""
    mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]
    outputs = model.apply(variables, tokens, mask=mask, cache=cache, return_logits=False)
    head = head_weight(variables["params"]).astype(outputs.features.dtype)
    assert outputs.cache is not None
    return head_token_losses(model.mesh, outputs.features, head, targets), outputs.cache
