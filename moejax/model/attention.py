"""The attention module: projections, rotary positions, the cache where there is one, and `ops.attention`."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.model.cache import Cache, KVCache, write_cache
from moejax.model.layers import Projection
from moejax.model.rolling_cache import RollingCache, RollingView, write_rolling
from moejax.ops.attention import Rotation, attend, rotate
from moejax.ops.attention_sinks import attend_with_sinks
from moejax.ops.visibility import Indices, Visibility
from moejax.sharding import constrain, partition_spec


@flax.struct.dataclass
class RowView:
    """How tokens are turned, and what they see of the row, or of a full cache."""

    rotation: Rotation
    visibility: Visibility


Reads = RowView | RollingView


class Attention(nn.Module):
    """Grouped-query attention without biases. Returns its output and the cache it was given, with this layer's tokens in it."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        reads: Reads,
        cache: Cache | None,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        size, width = config.hidden_size, config.head_width

        def split_heads(name: str, axis: str, heads: int) -> Array:
            out = Projection(config, (heads * width, size), (axis, "embed"), name=name)(x)
            # Said before the rotation: there the partitioner would divide the time over the heads' axis, and undo it by a whole copy.
            return constrain(out.reshape(*x.shape[:2], heads, width), self.mesh, "batch", "time", axis, None)

        query = split_heads("query", "heads", config.num_heads)
        key = split_heads("key", "kv_heads", config.num_kv_heads)
        value = split_heads("value", "kv_heads", config.num_kv_heads)
        if isinstance(reads, RollingView):
            assert isinstance(cache, RollingCache)
            cache, key, value = write_rolling(cache, layer, key, value, reads.slots)
            mixed = _attend_rolling(self.mesh, query, key, value, reads, cache.sinks, config.attention_window)
        else:
            query, key = rotate(query, reads.rotation), rotate(key, reads.rotation)
            if cache is not None:
                assert isinstance(cache, KVCache)
                cache, key, value = write_cache(cache, layer, key, value)
            query = constrain(query, self.mesh, "batch", "time", "heads", None)
            # Keys of the whole row, wherever its parts lie: they are gathered over the axis that divides the time.
            key, value = (constrain(part, self.mesh, "batch", None, "kv_heads", None) for part in (key, value))
            mixed = _attend_on_mesh(self.mesh, query, key, value, reads.visibility)
        mixed = mixed.reshape(*x.shape[:2], config.num_heads * width)
        return Projection(config, (size, config.num_heads * width), ("embed", "heads"), name="out")(mixed), cache


def _attend_rolling(
    mesh: Mesh | None, query: Array, key: Array, value: Array, view: RollingView, sinks: int, attention_window: int | None
) -> Array:
    """Attention to keys that are turned as they are read, by the places that the view gives them."""
    key, value = (constrain(part, mesh, "batch", None, "kv_heads", None) for part in (rotate(key, view.key), value))
    turned = constrain(rotate(query, view.query), mesh, "batch", "time", "heads", None)
    if view.sink_query is None or view.sink_index is None:
        return _attend_on_mesh(mesh, turned, key, value, view.visibility)
    to_sinks = constrain(rotate(query, view.sink_query), mesh, "batch", "time", "heads", None)
    return attend_with_sinks(to_sinks, turned, key, value, view.sink_index, view.visibility, sinks, attention_window)


def _attend_on_mesh(mesh: Mesh | None, query: Array, key: Array, value: Array, visibility: Visibility) -> Array:
    """`attend` of every device's own rows, queries and heads: kernels see one device's arrays, and nothing is moved between devices."""
    if mesh is None:
        return attend(query, key, value, visibility)
    by_query = partition_spec(("batch", "time", "heads", None), query.shape, mesh)
    by_key = partition_spec(("batch", None, "kv_heads", None), key.shape, mesh)

    def along(indices: Indices, spec: Any) -> Indices:
        return Indices(*(None if part is None else PartitionSpec(*spec[:2]) for part in indices))  # pyright: ignore[reportArgumentType]

    def local(query: Array, key: Array, value: Array, queries: Indices, keys: Indices, blind: Array | None) -> Array:
        return attend(query, key, value, dataclasses.replace(visibility, queries=queries, keys=keys, blind=blind))

    blind = None if visibility.blind is None else PartitionSpec(*by_query[:2])
    specs = (by_query, by_key, by_key, along(visibility.queries, by_query), along(visibility.keys, by_key), blind)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_query, check_vma=False)
    return mapped(query, key, value, visibility.queries, visibility.keys, visibility.blind)
