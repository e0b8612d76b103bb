"""The attention module: projections, rotary positions, the cache where there is one, and `ops.attention`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.model.cache import KVCache, write_cache
from moejax.model.layers import Projection
from moejax.ops.attention import Rotation, attend, rotate
from moejax.ops.visibility import Indices, Visibility
from moejax.sharding import constrain, partition_spec


class Attention(nn.Module):
    """Grouped-query attention without biases. Returns its output and the cache it was given, with this layer's tokens in it."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        visibility: Visibility,
        cache: KVCache | None,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        config = self.config
        size, width = config.hidden_size, config.head_width

        def split_heads(name: str, axis: str, heads: int) -> Array:
            out = Projection(config, (heads * width, size), (axis, "embed"), name=name)(x)
            # Said before the rotation: there the partitioner would divide the time over the heads' axis, and undo it by a whole copy.
            return constrain(out.reshape(*x.shape[:2], heads, width), self.mesh, "batch", "time", axis, None)

        query = rotate(split_heads("query", "heads", config.num_heads), rotation)
        key = rotate(split_heads("key", "kv_heads", config.num_kv_heads), rotation)
        value = split_heads("value", "kv_heads", config.num_kv_heads)
        if cache is not None:
            cache, key, value = write_cache(cache, layer, key, value)
        query = constrain(query, self.mesh, "batch", "time", "heads", None)
        # Keys of the whole row, wherever its parts lie: they are gathered over the axis that divides the time.
        key, value = (constrain(part, self.mesh, "batch", None, "kv_heads", None) for part in (key, value))
        mixed = _attend_on_mesh(self.mesh, query, key, value, visibility).reshape(*x.shape[:2], config.num_heads * width)
        return Projection(config, (size, config.num_heads * width), ("embed", "heads"), name="out")(mixed), cache


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
