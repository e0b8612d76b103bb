"""The attention module: projections, rotary positions, the cache where there is one, and `ops.attention`."""

import flax.linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from moejax.config import ModelConfig
from moejax.model.cache import KVCache, write_cache
from moejax.model.layers import Projection
from moejax.ops.attention import Rotation, attend, rotate
from moejax.sharding import constrain


class Attention(nn.Module):
    """Grouped-query attention without biases. Returns its output and the cache it was given, with this layer's tokens in it."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        visible: Bool[Array, "B T S"],
        cache: KVCache | None,
        layer: Int[Array, ""] | int,
        num_keys: int | None = None,
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
        visible = constrain(visible, self.mesh, "batch", "time", None)
        mixed = attend(query, key, value, visible, num_keys).reshape(*x.shape[:2], config.num_heads * width)
        return Projection(config, (size, config.num_heads * width), ("embed", "heads"), name="out")(mixed), cache
