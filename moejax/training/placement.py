"""Where a run's state and its batches lie on the model's mesh; without one, where jax puts them."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import ModelConfig, UserError
from moejax.model.partition import parameter_shardings, shardings_like
from moejax.model.transformer import Transformer, abstract_parameters
from moejax.sharding import axis_size, partition_spec


@functools.lru_cache(maxsize=16)
def optimizer_shardings(config: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> Any:
    """A NamedSharding for every array of the optimiser's state: moments lie with their parameter, all else is whole everywhere."""
    params = abstract_parameters(config)
    state = jax.eval_shape(optimizer.init, params)
    return shardings_like(state, params, parameter_shardings(config, mesh), mesh)


def state_shardings(model: Transformer, optimizer: optax.GradientTransformation, state: Any) -> Any:
    """A NamedSharding for every leaf of a state, as every step gets and leaves it; the state, or an abstract one, says what it holds."""
    assert model.mesh is not None
    whole = NamedSharding(model.mesh, PartitionSpec())
    return state.replace(
        step=whole,
        params=parameter_shardings(model.config, model.mesh),
        optimizer_state=optimizer_shardings(model.config, model.mesh, optimizer),
        counters=jax.tree.map(lambda _: whole, state.counters),
    )


def place_state(model: Transformer, optimizer: optax.GradientTransformation, state: Any) -> Any:
    """The state, inside a compiled function, laid out as every step gets and leaves it."""
    if model.mesh is None:
        return state
    return lax.with_sharding_constraint(state, state_shardings(model, optimizer, state))


def place_gradients(model: Transformer, gradients: Any) -> Any:
    """Gradients laid out as their parameters: each device keeps the sum of its own part alone."""
    if model.mesh is None:
        return gradients
    return lax.with_sharding_constraint(gradients, parameter_shardings(model.config, model.mesh))


def describe_placed(model: Transformer, optimizer: optax.GradientTransformation, state: Any) -> Any:
    """An abstract state with shardings: what a checkpoint is restored into."""
    if model.mesh is None:
        return state

    def describe(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, state, state_shardings(model, optimizer, state))


def part_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of arrays or shapes, those with a sharding divided by it."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def rows_of_process(mesh: Mesh | None, batch_size: int) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal parts of every batch, the rows that its devices hold.

    Raises UserError where several processes run and the mesh does not divide the batch, or a process's devices hold rows that do not
    lie together.
    """
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    divisor = axis_size(mesh, "data", "fsdp", "expert")
    if batch_size % divisor:
        raise UserError(
            f"train.batch_size={batch_size} is not a multiple of mesh.data x mesh.fsdp x mesh.expert = {divisor}, as it must be where "
            f"several processes feed it; set --train.batch-size to one, as {-(-batch_size // divisor) * divisor}"
        )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"))).addressable_devices_indices_map((batch_size,))
    held = {index[0].indices(batch_size)[:2] for index in rows.values() if index is not None}
    first, last = min(start for start, _ in held), max(stop for _, stop in held)
    size = last - first
    if sum(stop - start for start, stop in held) != size or first % size or batch_size % size:
        raise UserError(
            "the rows of a batch that this process's devices hold do not lie together: the mesh runs across processes in its outer axes "
            "only; give data, fsdp and expert sizes of which the product of the last ones is a process's number of devices"
        )
    return first // size, batch_size // size


def place_batches(mesh: Mesh | None, batch_size: int, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches on the mesh, their rows divided over it; each process gives the part that `rows_of_process` names."""
    for batch in batches:
        yield batch if mesh is None else place_batch(mesh, batch_size, batch)


def place_batch(mesh: Mesh, batch_size: int, batch: Any) -> Any:
    """One batch, of which this process gives its part, on the mesh."""

    def place(part: Any) -> jax.Array:
        shape = (batch_size, *part.shape[1:])
        sharding = NamedSharding(mesh, partition_spec(("batch", "time"), shape, mesh))
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return jax.tree.map(place, batch)


def fetch(array: jax.Array) -> np.ndarray:
    """The values of an array on the host, also where parts of it lie on other processes' devices; all of them call this."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding)
        array = _spread(NamedSharding(array.sharding.mesh, PartitionSpec()), array)
    return np.asarray(array)


@functools.partial(jax.jit, static_argnums=0)
def _spread(sharding: NamedSharding, array: jax.Array) -> jax.Array:
    return lax.with_sharding_constraint(array, sharding)
