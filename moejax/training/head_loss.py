"""The head and its loss on a mesh: every device takes its own rows through the whole head."""

from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from moejax.ops.cross_entropy import cross_entropy, token_losses
from moejax.sharding import axis_size

# Rows are divided over the tensor axis too, along the time: it would otherwise do all of this work several times.
ROWS = PartitionSpec(("data", "fsdp", "expert"), ("context", "tensor"))
AXES = ("data", "fsdp", "expert", "context", "tensor")


def head_cross_entropy(
    mesh: Mesh | None,
    features: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Sum of weight * -log softmax(features headᵀ)[target], float32; no gradient flows to `weights`."""

    def local(features: Array, head: Array, targets: Array, weights: Array) -> Array:
        return cross_entropy(features.reshape(-1, features.shape[-1]), head, targets.reshape(-1), weights.reshape(-1))

    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    if mesh is None:
        return local(features, head, targets, weights)
    filled = [_fill(mesh, part) for part in (features, targets, weights)]
    mapped = jax.shard_map(
        lambda x, head, targets, weights: lax.psum(local(x, head, targets, weights), AXES),
        mesh=mesh, in_specs=(ROWS, PartitionSpec(), ROWS, ROWS), out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip
    return mapped(filled[0], head, filled[1], filled[2])


def head_token_losses(
    mesh: Mesh | None, features: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log softmax(features headᵀ)[target] in nats, float32."""

    def local(features: Array, head: Array, targets: Array) -> Array:
        return token_losses(features.reshape(-1, features.shape[-1]), head, targets.reshape(-1)).reshape(targets.shape)

    if mesh is None:
        return local(features, head, targets)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, PartitionSpec(), ROWS), out_specs=ROWS, check_vma=False)
    return mapped(_fill(mesh, features), head, _fill(mesh, targets))[: targets.shape[0], : targets.shape[1]]


def _fill(mesh: Mesh, array: Any) -> Array:
    """The array [B, T, ...] with zeros added until the mesh divides it; a weight of zero keeps them out of every sum."""
    rows, times = -array.shape[0] % axis_size(mesh, *ROWS[0]), -array.shape[1] % axis_size(mesh, *ROWS[1])
    return jnp.pad(jnp.asarray(array), ((0, rows), (0, times), *((0, 0),) * (array.ndim - 2)))
