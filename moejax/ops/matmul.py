"""The one matmul of the models: rows times an output-major weight, at full precision where the type is float32."""

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """HIGHEST for float32, so that TPUs and GPUs do not round its inputs to fewer bits; the default for narrower types."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def project(x: Float[Array, "*rows inside"], weight: Float[Array, "outside inside"]) -> Float[Array, "*rows outside"]:
    """y = x Wᵀ: contracts the last axis of `x` with the last axis of `weight`; the result has the type of `x`."""
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=precision_of(x.dtype))
