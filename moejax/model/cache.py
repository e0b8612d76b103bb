"""The key/value cache of decoding: an explicit argument and an explicit result, never hidden state."""

import dataclasses

import flax.struct
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, rotated keys, one slot a token; row b's tokens fill slots 0..lengths[b]-1.

    A slot past a row's length holds anything: no query ever sees it, and the row's next token overwrites it.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys.shape[2]


def create_cache(config: ModelConfig, batch_size: int, capacity: int) -> KVCache:
    """An empty cache for `batch_size` rows of at most `capacity` tokens, in the model's compute type."""
    shape = (config.num_layers, batch_size, capacity, config.num_kv_heads, config.head_width)
    # Two arrays, not one twice: the cache is donated to every step.
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros(batch_size, jnp.int32))


def write_cache(
    cache: KVCache, layer: Int[Array, ""] | int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
) -> tuple[KVCache, Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Writes T tokens a row at slots lengths..lengths+T-1 of one layer; returns the cache and that layer's keys and values.

    Lengths are not advanced (all layers write at the same place). Tokens past the capacity are dropped: callers size the cache.
    """
    rows = jnp.arange(keys.shape[0])[:, None]
    slots = cache.lengths[:, None] + jnp.arange(keys.shape[1])[None, :]
    new_keys = cache.keys.at[layer, rows, slots].set(keys.astype(cache.keys.dtype), mode="drop")
    new_values = cache.values.at[layer, rows, slots].set(values.astype(cache.values.dtype), mode="drop")
    return dataclasses.replace(cache, keys=new_keys, values=new_values), new_keys[layer], new_values[layer]
