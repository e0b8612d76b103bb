"""The modules that own weights. Projection, Router, ExpertKernel and Head are the only readers of matmul weights."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.ops.matmul import InputMajor, project
from moejax.sharding import constrain

Axes = tuple[str | None, ...]


def _normal(config: ModelConfig, axes: Axes) -> Callable[..., Any]:
    return nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), axes)


def _read_kernel(module: nn.Module, config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> Any:
    """The module's `kernel`, output-major as in every checkpoint, or the InputMajor one that was put in its place (`turn_kernels`)."""
    if module.has_variable("params", "kernel") and isinstance(kernel := module.get_variable("params", "kernel"), InputMajor):
        if kernel.shape != shape:
            raise ValueError(f"the kernel of {'/'.join(module.path)} has the shape {kernel.shape}; expected {shape}")
        return kernel
    return module.param("kernel", _normal(config, axes), shape, jnp.dtype(config.param_dtype))


def turn_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """The parameter tree with the weights of all matmuls but the router's input-major, for a model without gradients on one CPU."""
    turned = {}
    for name, value in params.items():
        if name == "kernel":
            turned[name] = InputMajor(value.swapaxes(-1, -2))
        else:
            turned[name] = turn_kernels(value) if isinstance(value, dict) and name != "router" else value
    return turned


class Projection(nn.Module):
    """y = x Wᵀ without bias; the weight is `kernel` [outputs, inputs], output-major as in PyTorch.

    Output-major makes import a copy, reads rows in order when decoding, and was as fast or faster than input-major in every
    training matmul measured (docs/performance.md).
    """

    config: ModelConfig
    shape: tuple[int, int]
    axes: Axes

    @nn.compact
    def __call__(self, x: Float[Array, "*rows inside"]) -> Float[Array, "*rows outside"]:
        return project(x, _read_kernel(self, self.config, self.shape, self.axes).astype(x.dtype))


class ExpertKernel(nn.Module):
    """The weights [E, outputs, inputs] of one projection of all experts, an array or InputMajor; multiplied by `ops.dispatch`."""

    config: ModelConfig
    shape: tuple[int, int, int]
    axes: Axes

    @nn.compact
    def __call__(self) -> Any:
        return _read_kernel(self, self.config, self.shape, self.axes).astype(self.config.dtype)


class Router(nn.Module):
    """Logits of the experts for every row, in the type of x; and their `bias`, None unless config.router_bias.

    The bias is float32 in a model of any type: it moves by steps of a thousandth, which bfloat16 would round away.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows E"], Float[Array, "E"] | None]:
        config, experts = self.config, self.config.num_experts
        shape = (experts, config.hidden_size)
        kernel = _read_kernel(self, config, shape, (None, "embed"))
        bias = None
        if config.router_bias:
            zeros: Any = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
            bias = self.param("bias", zeros, (experts,), jnp.float32)
        return project(x, kernel.astype(x.dtype)), bias


class RMSNorm(nn.Module):
    """g * x / sqrt(mean(x²) + epsilon): statistics in float32, cast to the type of x, then scaled (Zhang & Sennrich 2019)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        ones: Any = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale = self.param("scale", ones, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        wide = x.astype(jnp.float32)
        normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.norm_epsilon)
        return normalised.astype(x.dtype) * scale.astype(x.dtype)[None, None, :]


class Embed(nn.Module):
    """The token embedding [V, D], also the head's weight where embeddings are tied. Not scaled."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        table = self.param("embedding", _normal(config, ("vocab", "embed")), shape, jnp.dtype(config.param_dtype))
        if self.mesh is None:
            return table[tokens].astype(config.dtype), table
        if tokens.size * 8 < config.vocab_size:  # few: their rows travel, and not the table
            return table.astype(config.dtype)[tokens], table
        # Whole on every device while rows are looked up: each then adds up the gradients of its own rows, and no row travels.
        return constrain(table.astype(config.dtype), self.mesh, None, None)[tokens], table


class Head(nn.Module):
    """The weight [V, D] of the output projection, an array or InputMajor, returned and not applied: the loss takes it in chunks."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Any:
        return _read_kernel(self, self.config, (self.config.vocab_size, self.config.hidden_size), ("vocab", "embed"))


class MLP(nn.Module):
    """down(silu(gate x) * up x) of width `width`."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config, size = self.config, self.config.hidden_size
        gate = Projection(config, (self.width, size), ("mlp", "embed"), name="gate")(x)
        up = Projection(config, (self.width, size), ("mlp", "embed"), name="up")(x)
        return Projection(config, (size, self.width), ("embed", "mlp"), name="down")(jax.nn.silu(gate) * up)
