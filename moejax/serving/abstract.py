"""What the programs of serving are given, as shapes with their places on a mesh: enough to compile them, nothing of it there."""

import math
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig
from moejax.model.cache import create_cache
from moejax.model.cache_storage import AXES
from moejax.model.partition import parameter_shardings
from moejax.model.transformer import abstract_parameters
from moejax.ops.sampling import Sampling
from moejax.serving.decoding import DecodeState, Limits
from moejax.sharding import partition_spec

STOP_IDS = 8  # a row, as the engine has them where no row has more


def abstract_variables(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The model's variables."""
    return {"params": jax.tree.map(_place, abstract_parameters(config), parameter_shardings(config, mesh))}


def abstract_cache(config: ModelConfig, mesh: Mesh, rows: int, capacity: int, cache: CacheConfig) -> Any:
    """The cache that `create_cache` makes. Raises UserError as it does."""
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: create_cache(config, rows, capacity, None, cache.kind, cache.sinks, cache.window, cache.dtype))

    def place(leaf: Any) -> Any:
        return _place(leaf, NamedSharding(mesh, partition_spec(AXES[: leaf.ndim], leaf.shape, mesh)) if leaf.ndim > 1 else whole)

    return jax.tree.map(place, shapes)


def prefill_inputs(config: ModelConfig, mesh: Mesh, variables: Any, cache: Any, rows: int, chunk: int) -> tuple[Any, ...]:
    """What `read_chunk` takes behind the model and its switches: variables, tokens, counts, features, cache."""
    last = _whole(mesh, rows, config.hidden_size, dtype=config.dtype)
    return variables, _whole(mesh, rows, chunk), _whole(mesh, rows), last, cache


def decode_inputs(mesh: Mesh, variables: Any, cache: Any, rows: int) -> tuple[Any, ...]:
    """What `decode` takes behind the model and Asked: variables, state, settings, limits, no history, steps; no penalty, no bias."""
    state = DecodeState(cache, _whole(mesh, rows), _whole(mesh, rows), _whole(mesh, rows, dtype=bool), None)
    numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    settings = {name: _whole(mesh, rows, dtype=jnp.float32) for name in numbers}
    settings |= {"top_k": _whole(mesh, rows), "seed": _whole(mesh, rows, dtype=jnp.uint32)}
    settings |= {"bias_ids": _whole(mesh, rows, 0), "bias_values": _whole(mesh, rows, 0, dtype=jnp.float32)}
    return variables, state, Sampling(**settings), Limits(_whole(mesh, rows, STOP_IDS), _whole(mesh, rows)), None, _whole(mesh)


def bytes_per_device(tree: Any) -> int:
    """Bytes of the arrays of a tree of shapes with shardings on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _place(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(mesh: Mesh, *sizes: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
