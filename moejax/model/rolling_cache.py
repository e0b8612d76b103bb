"""A cache whose memory and step cost stay the same for ever: the last W tokens of a row, and before them, if wanted, its first S.

Keys are kept without rotation and turned when they are read, by positions in the cache: 0 for the first kept token, S + W - 1 for the
newest. A row's whole length only picks slots, so nothing loses precision however long it becomes. With S = 0 that is the rolling window,
the same as with absolute positions, for rotation depends on distances alone. With sinks it is StreamingLLM (Xiao et al. 2023).
"""

import dataclasses

import flax.struct
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.model.cache_storage import Stored, pass_through, read_stored, write_stored
from moejax.model.positions import model_frequencies
from moejax.ops.attention import Rotation, rotary_angles
from moejax.ops.visibility import FAR, Indices, Visibility


@flax.struct.dataclass
class RollingCache:
    """Keys (not rotated) and values of all layers: `sinks` slots of the first tokens, then a ring of the last ones.

    Token t of a row lies in slot t while t < sinks, then in sinks + (t - sinks) mod window. `lengths` counts the tokens read, those that
    are gone too; it is int32, which ends at two thousand million. A slot not yet filled is seen by no query.
    """

    keys: Stored  # [L, B, S, K, H]
    values: Stored
    lengths: Int[Array, "B"]
    sinks: int = flax.struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Tokens a row's cache holds, sinks included."""
        return self.keys.shape[2]

    @property
    def window(self) -> int:
        """The newest tokens that a query sees beside the sinks, its own included."""
        return self.capacity - self.sinks


@flax.struct.dataclass
class RollingView:
    """How one pass of T tokens a row reads and writes the cache; the same for every layer.

    The keys are the slots, the pass's own among them where T is 1. Of more tokens each sees another part of the ring: there the keys are
    the sinks, the ring as it was before the pass, then the pass's own. Only distances to a sink stop growing when the cache is full, so
    such queries are turned twice: for the sinks by their position in the cache, for all else by a position that goes on.
    """

    slots: Int[Array, "B T"]  # where each token goes; past the last slot for those that are not kept
    query: Rotation
    key: Rotation
    visibility: Visibility
    sink_query: Rotation | None = None  # None: as `query`
    sink_index: Int[Array, "B T"] | None = None


def view_rolling(cache: RollingCache, config: ModelConfig, time: int, real: Array | None) -> RollingView:
    """The view of the next `time` tokens of every row, of which `real` [B, T] (padding on the right; None: all) are kept."""
    sinks, ring = cache.sinks, cache.window
    frequencies = model_frequencies(config, cache.capacity)
    start = cache.lengths[:, None]
    steps = jnp.arange(time, dtype=jnp.int32)[None, :]
    tokens = start + steps
    last = start if time == 1 else start - 1  # the newest token in the ring when it is read
    shift = jnp.maximum(0, start - (cache.capacity - 1))  # from a token's index to the position that the first query sees it at
    offsets = jnp.arange(ring, dtype=jnp.int32)[None, :]
    in_ring = last - (last - sinks - offsets) % ring  # the token in each slot of the ring
    in_ring = jnp.where(in_ring >= sinks, in_ring - shift, FAR)
    in_sinks = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None, :], (start.shape[0], sinks))
    parts = [in_sinks, in_ring] if time == 1 else [in_sinks, in_ring, jnp.where(tokens >= sinks, tokens - shift, FAR)]
    key_index = jnp.concatenate(parts, axis=1)
    query_index = tokens - shift
    window = config.attention_window
    if time > 1:
        window = min(ring, window or ring)
    sink_index = jnp.minimum(tokens, cache.capacity - 1) if sinks and time > 1 else None
    return RollingView(
        slots=_choose_slots(cache, tokens, steps, real),
        query=rotary_angles(query_index, frequencies),
        key=rotary_angles(jnp.where(key_index == FAR, 0, key_index), frequencies),
        visibility=Visibility(Indices(query_index), Indices(key_index), window=window),
        sink_query=None if sink_index is None else rotary_angles(sink_index, frequencies),
        sink_index=sink_index,
    )


def _choose_slots(cache: RollingCache, tokens: Array, steps: Array, real: Array | None) -> Array:
    """Slots of the tokens; of more than the ring holds the last ones stay, so that no slot is written twice in a pass."""
    sinks, ring = cache.sinks, cache.window
    count = steps.shape[1] if real is None else jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
    kept = (steps < count) & ((tokens < sinks) | (steps >= count - ring))
    return jnp.where(kept, jnp.where(tokens < sinks, tokens, sinks + (tokens - sinks) % ring), cache.capacity)


def write_rolling(
    cache: RollingCache,
    layer: Int[Array, ""] | int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
) -> tuple[RollingCache, Float[Array, "B keys K H"], Float[Array, "B keys K H"]]:
    """Writes T tokens a row into one layer; returns the cache, and the keys and values that the pass reads, in the view's order."""
    rows = jnp.arange(keys.shape[0])[:, None]

    def write(whole: Stored, new: Array) -> tuple[Stored, Array]:
        written = write_stored(whole, (layer, rows, slots), new)
        if new.shape[1] == 1:
            return written, read_stored(written, layer, new.dtype)
        sinks, before = read_stored(written, layer, new.dtype)[:, : cache.sinks], read_stored(whole, layer, new.dtype)[:, cache.sinks :]
        return written, jnp.concatenate([sinks, before, pass_through(whole, new)], axis=1)

    new_keys, read_keys = write(cache.keys, keys)
    new_values, read_values = write(cache.values, values)
    return dataclasses.replace(cache, keys=new_keys, values=new_values), read_keys, read_values
