"""The next token from logits: greedy, temperature, top-k, top-p. Settings are arrays, one per row."""

from typing import NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int, Key


class Sampling(NamedTuple):
    """Per-row settings: temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]


def filter_logits(logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """-inf outside the top_k largest, then outside the smallest set whose probability reaches top_p (nucleus sampling,
    Holtzman et al. 2020). The most likely token always stays; ties at the k-th place go to the lower id."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, :]
    keep = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probability = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1.0)
    keep |= rank == 0
    place = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, place, axis=-1), logits, -jnp.inf)


def sample_tokens(logits: Float[Array, "B V"], settings: Sampling, keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """One token a row, each from its own key, so that a row's draw does not depend on its company."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
        filtered = filter_logits(scaled, settings.top_k, settings.top_p)
        drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
        return jnp.where(settings.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)
