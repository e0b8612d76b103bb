"""How a cache keeps its keys and values: as they are, or as int8 with one scale a head vector."""

from typing import Any

import flax.struct
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int8

from moejax.sharding import constrain, partition_spec

AXES = (None, "batch", None, "kv_heads", None)  # of keys and values [L, B, S, K, H]; scales lack the last


@flax.struct.dataclass
class Int8Vectors:
    """Vectors of a head as whole numbers in -127..127 times a scale, the largest entry over 127: off by half a scale at most."""

    whole: Int8[Array, "*rest H"]
    scale: Float[Array, "*rest"]  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the vectors."""
        return self.whole.shape


Stored = Array | Int8Vectors


def quantize_vectors(vectors: Float[Array, "*rest H"]) -> Int8Vectors:
    """Each vector's nearest multiples of its own scale; a vector of zeros has scale 0."""
    vectors = vectors.astype(jnp.float32)
    scale = jnp.max(jnp.abs(vectors), axis=-1) / 127.0
    whole = jnp.round(vectors / jnp.where(scale > 0.0, scale, 1.0)[..., None])
    return Int8Vectors(whole.astype(jnp.int8), scale)


def create_stored(shape: tuple[int, ...], dtype: str, kept_as: str, mesh: Mesh | None) -> Stored:
    """Zeros [L, B, S, K, H]: of the model's type, or int8; on a mesh, rows and heads divided."""

    def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
        place = None if mesh is None else NamedSharding(mesh, partition_spec(AXES[: len(shape)], shape, mesh))
        return jnp.zeros(shape, dtype, device=place)

    if kept_as == "int8":
        return Int8Vectors(zeros(shape, jnp.int8), zeros(shape[:-1], jnp.float32))
    return zeros(shape, dtype)


def place_stored(stored: Stored, mesh: Mesh | None) -> Stored:
    """The same on the mesh as `create_stored` laid it out, inside a compiled function."""
    if isinstance(stored, Int8Vectors):
        return Int8Vectors(constrain(stored.whole, mesh, *AXES), constrain(stored.scale, mesh, *AXES[:-1]))
    return constrain(stored, mesh, *AXES)


def write_stored(stored: Stored, where: tuple[Any, ...], vectors: Float[Array, "B T K H"]) -> Stored:
    """The vectors at (layer, rows, slots); those of slots that there are not are dropped."""
    if isinstance(stored, Int8Vectors):
        new = quantize_vectors(vectors)
        return Int8Vectors(stored.whole.at[where].set(new.whole, mode="drop"), stored.scale.at[where].set(new.scale, mode="drop"))
    return stored.at[where].set(vectors.astype(stored.dtype), mode="drop")


def read_stored(stored: Stored, layer: Any, dtype: Any) -> Float[Array, "B S K H"]:
    """One layer's vectors, in `dtype`."""
    if isinstance(stored, Int8Vectors):
        return (stored.whole[layer].astype(jnp.float32) * stored.scale[layer][..., None]).astype(dtype)
    return stored[layer]


def pass_through(stored: Stored, vectors: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """The vectors as they would be read again, so that tokens of one call see of each other what later ones will."""
    if isinstance(stored, Int8Vectors):
        kept = quantize_vectors(vectors)
        return (kept.whole.astype(jnp.float32) * kept.scale[..., None]).astype(vectors.dtype)
    return vectors.astype(stored.dtype)
