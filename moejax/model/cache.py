"""The key/value cache of decoding: an explicit argument and an explicit result, never hidden state.

Here is the full one, and `create_cache` for all kinds; `model.rolling_cache` has the kinds that forget.
"""

import dataclasses

import flax.struct
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig, UserError
from moejax.model.cache_storage import Stored, create_stored, place_stored, read_stored, write_stored
from moejax.model.rolling_cache import RollingCache
from moejax.sharding import constrain


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, rotated keys, one slot a token; row b's tokens fill slots 0..lengths[b]-1.

    A slot past a row's length holds anything: no query ever sees it, and the row's next token overwrites it.
    """

    keys: Stored  # [L, B, S, K, H]
    values: Stored
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys.shape[2]


Cache = KVCache | RollingCache


def create_cache(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    mesh: Mesh | None = None,
    kind: str = "full",
    sinks: int = 4,
    window: int | None = None,
    dtype: str = "model",
) -> Cache:
    """An empty cache for `batch_size` rows, in the model's compute type or in int8; on a mesh, rows and heads divided.

    full: at most `capacity` tokens a row. The others hold a row of any length, whatever `capacity`: window its last `window` tokens (None:
    what the model's attention sees, or max_length), sinks its first `sinks` tokens and then the last `window` (None: max_length in all).
    Raises UserError for sizes that make no cache.
    """
    settings = CacheConfig(kind, sinks, window, dtype)  # pyright: ignore[reportArgumentType]  # it checks the names
    sinks, slots = _choose_sizes(config, capacity, settings)
    shape = (config.num_layers, batch_size, slots, config.num_kv_heads, config.head_width)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    # Two arrays, not one twice: the cache is donated to every step.
    keys, values = (create_stored(shape, config.dtype, dtype, mesh) for _ in range(2))
    lengths = jnp.zeros(batch_size, jnp.int32, device=whole)
    return KVCache(keys, values, lengths) if kind == "full" else RollingCache(keys, values, lengths, sinks)


def _choose_sizes(config: ModelConfig, capacity: int, settings: CacheConfig) -> tuple[int, int]:
    """Sinks, and slots in all."""
    if settings.kind == "full":
        return 0, capacity
    sinks, window = settings.sinks if settings.kind == "sinks" else 0, settings.window
    if window is None:
        window = (config.attention_window or config.max_length) if settings.kind == "window" else config.max_length - sinks
    if window < 1:
        raise UserError(f"cache.sinks={sinks} leaves no window of the {config.max_length} positions of this model; set --cache.window")
    return sinks, sinks + window


def place_cache(cache: Cache, mesh: Mesh | None) -> Cache:
    """The cache as `create_cache` laid it out, inside a compiled function: the next step gets it so, and can have its memory."""
    keys, values = (place_stored(part, mesh) for part in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values, lengths=constrain(cache.lengths, mesh, None))


def write_cache(
    cache: KVCache, layer: Int[Array, ""] | int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
) -> tuple[KVCache, Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Writes T tokens a row at slots lengths..lengths+T-1 of one layer; returns the cache and that layer's keys and values.

    Lengths are not advanced (all layers write at the same place). Tokens past the capacity are dropped: callers size the cache.
    """
    rows = jnp.arange(keys.shape[0])[:, None]
    slots = cache.lengths[:, None] + jnp.arange(keys.shape[1])[None, :]
    new_keys, new_values = (write_stored(part, (layer, rows, slots), new) for part, new in ((cache.keys, keys), (cache.values, values)))
    cache = dataclasses.replace(cache, keys=new_keys, values=new_values)
    return cache, read_stored(new_keys, layer, keys.dtype), read_stored(new_values, layer, values.dtype)
