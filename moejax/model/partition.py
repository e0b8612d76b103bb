"""Where the parameters of a model lie on its mesh: the logical axes they were declared with, through the table of `moejax.sharding`."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import ModelConfig
from moejax.model.transformer import Transformer
from moejax.sharding import partition_spec


@functools.lru_cache(maxsize=64)
def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding for every parameter of the model's tree (stacked or not, as config.scan_layers says)."""
    boxed = jax.eval_shape(
        functools.partial(Transformer(config).init, return_logits=False), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    axes = nn.get_partition_spec(boxed)

    def place(leaf: Any, names: PartitionSpec) -> NamedSharding:
        padded = (*names, *(None,) * (leaf.ndim - len(names)))
        return NamedSharding(mesh, partition_spec(padded, leaf.shape, mesh))

    return jax.tree.map(place, nn.unbox(boxed), axes)


def shardings_like(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for any tree (an optimiser's state): a leaf whose path ends as a parameter's, with its shape, lies as that one does.

    All others (counts, factored moments) lie whole on every device.
    """
    places = {}
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True):
        places[(_keys(path), leaf.shape)] = sharding
    longest = max(len(keys) for keys, _ in places)

    def find(path: tuple, leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for size in range(min(longest, len(keys)), 0, -1):
            if (keys[-size:], leaf.shape) in places:
                return places[(keys[-size:], leaf.shape)]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(find, tree)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
