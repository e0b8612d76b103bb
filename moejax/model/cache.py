"""The key/value cache of decoding: an explicit argument and an explicit result, never hidden state."""

import dataclasses

import flax.struct
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.sharding import constrain, partition_spec


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


AXES = (None, "batch", None, "kv_heads", None)


def create_cache(config: ModelConfig, batch_size: int, capacity: int, mesh: Mesh | None = None) -> KVCache:
    """An empty cache for `batch_size` rows of at most `capacity` tokens, in the model's compute type; on a mesh, rows and heads divided."""
    shape = (config.num_layers, batch_size, capacity, config.num_kv_heads, config.head_width)
    place = None if mesh is None else NamedSharding(mesh, partition_spec(AXES, shape, mesh))
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    # Two arrays, not one twice: the cache is donated to every step.
    keys, values = (jnp.zeros(shape, config.dtype, device=place) for _ in range(2))
    return KVCache(keys, values, jnp.zeros(batch_size, jnp.int32, device=whole))


def place_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """The cache as `create_cache` laid it out, inside a compiled function: the next step gets it so, and can have its memory."""
    return KVCache(constrain(cache.keys, mesh, *AXES), constrain(cache.values, mesh, *AXES), constrain(cache.lengths, mesh, None))


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
