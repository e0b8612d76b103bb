"""The one matmul of the models: rows times a weight, at full precision where the type is float32."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputMajor:
    """A weight, or several stacked, that lies input-major in memory; `shape` is still the output-major one, [..., outputs, inputs].

    XLA on CPU multiplies few rows by it up to 1.6 times as fast (`python -m moejax.bench storage_order`). An engine that decodes on a CPU
    turns its weights so; `project` and the experts' MLP take them as they lie, without a gradient, everything else `as_output_major`.
    """

    array: Any  # [..., inputs, outputs]; Any, as trees of this class hold shapes and shardings too

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., outputs, inputs]."""
        return *self.array.shape[:-2], self.array.shape[-1], self.array.shape[-2]

    def astype(self, dtype: jax.typing.DTypeLike) -> "InputMajor":
        """In another type, and still input-major."""
        return InputMajor(self.array.astype(dtype))


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """HIGHEST for float32, so that TPUs and GPUs do not round its inputs to fewer bits; the default for narrower types."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def project(x: Float[Array, "*rows inside"], weight: Float[Array, "outside inside"] | InputMajor) -> Float[Array, "*rows outside"]:
    """y = x Wᵀ: contracts the last axis of `x` with the weight's inputs; the result has the type of `x`."""
    array, inputs = (weight.array, 0) if isinstance(weight, InputMajor) else (weight, 1)
    dimensions = (((x.ndim - 1,), (inputs,)), ((), ()))
    return lax.dot_general(x, array, dimensions, precision=precision_of(x.dtype))


def as_output_major(weights: Any) -> Any:
    """A weight, or a tree of weights, with every InputMajor one turned, which is a copy."""

    def turn(weight: Any) -> Array:
        return weight.array.swapaxes(-1, -2) if isinstance(weight, InputMajor) else weight

    return jax.tree.map(turn, weights, is_leaf=lambda weight: isinstance(weight, InputMajor))
