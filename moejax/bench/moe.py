"""One layer of experts: router, rows to their experts, their MLPs, back; forward, and forward with all gradients.

Every dispatch and number of tokens beside the same FLOP as one perfectly balanced batched matmul. FLOP are those of the choices that
were computed and counted: what capacity drops is not, nor what `dense` computes for nothing.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import flax.linen as nn
import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.bench.counts import count_layer_bytes, count_layer_flops
from moejax.bench.measure import Ceilings, Timing, compile_program, describe_rates, describe_shape, temporary_bytes, time_calls
from moejax.bench.output import Output, report
from moejax.bench.shape import LAYER_FIELDS, PEER_SHAPE
from moejax.config import DispatchName, MeshConfig, ModelConfig, UserError

ON_ONE_DEVICE = ("sorted", "capacity", "dense")
ON_EXPERT_AXIS = ("gather", "ragged", "capacity")
BALANCED = "balanced matmul"
PASSES = ("forward", "forward and backward")
COLUMNS = (
    "seconds", "seconds_lowest", "seconds_highest", "tokens_per_second", "flops_per_second", "fraction_of_ceiling", "fraction_of_balanced",
    "compile_seconds", "temporary_bytes", "dropped_choices",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Output):
    """Times one MoE layer of `model`."""

    model: ModelConfig = field(default_factory=lambda: PEER_SHAPE)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokens: tuple[int, ...] = (2048, 256)  # rows of one call
    dispatch: tuple[str, ...] = ()  # kinds; none: all that run on these devices
    repeats: int = 7

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise UserError(f"tokens={self.tokens}; expected one number of rows or more, each above 0")
        kinds = ON_EXPERT_AXIS if self.mesh.expert > 1 else ON_ONE_DEVICE
        for kind in self.dispatch:
            if kind not in get_args(DispatchName) or kind not in kinds:
                raise UserError(
                    f"dispatch has {kind!r}; expected some of {', '.join(kinds)}, which is what runs with mesh.expert={self.mesh.expert}"
                )


@dataclass(frozen=True)
class Layer:
    """One compiled call of a layer, and what it counts for."""

    run: Callable[[], Any]
    flops: int
    bytes: float | None
    facts: dict[str, Any]


def compile_layer(config: ModelConfig, mesh: Mesh | None, rows: int, backward: bool) -> Layer:
    """A layer of `config` on random rows [rows, D]; with `backward`, the gradients of weights and rows as well."""
    from moejax.model.expert_dispatch import TokenInputs
    from moejax.model.moe import MoE

    layer = MoE(config, mesh)
    devices = 1 if mesh is None else mesh.size
    if rows % devices:
        raise UserError(f"tokens has {rows}, which {devices} devices do not divide; use a multiple of {devices}")
    x = jax.random.normal(jax.random.key(0), (devices, rows // devices, config.hidden_size), config.dtype)
    boxed = jax.jit(functools.partial(MoE(config).init, inputs=TokenInputs()))(jax.random.key(1), x[:1, :1])
    params, x, cotangent = _place(boxed, x, mesh)

    def forward(params: Any, x: Any) -> Any:
        return cast(Any, layer.apply(params, x, TokenInputs()))[0]

    def with_gradients(params: Any, x: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(forward, params, x)
        return out, pull(cotangent)

    arguments = (params, x, cotangent) if backward else (params, x)
    compiled, compile_seconds = compile_program(jax.jit(with_gradients if backward else forward), *arguments)
    router = jax.jit(lambda params, x: cast(Any, layer.apply(params, x, TokenInputs()))[1])(params, x)
    load, dropped = np.asarray(router.statistics.load), int(router.dropped)
    choices = rows * config.experts_per_token - dropped
    return Layer(
        functools.partial(compiled, *arguments),
        count_layer_flops(config, rows, choices) * (3 if backward else 1),
        None if backward else count_layer_bytes(config, rows, int(np.count_nonzero(load))),
        {
            "compile_seconds": compile_seconds,
            "temporary_bytes": temporary_bytes(compiled),
            "dropped_choices": dropped,
            "load_max_over_mean": float(load.max() / load.mean()),
        },
    )


def _place(boxed: Any, x: Any, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    """(weights, rows, the gradient of the result) where a model on this mesh has them."""
    from moejax.sharding import partition_spec

    params = nn.unbox(boxed)
    if mesh is not None:
        specs = nn.get_partition_spec(boxed)
        params = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, partition_spec(tuple(spec), leaf.shape, mesh))),
            params,
            specs,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )
        x = jax.device_put(x, NamedSharding(mesh, partition_spec(("batch", "time", None), x.shape, mesh)))
    return params, x, jnp.ones_like(x)


def compile_balanced(config: ModelConfig, rows: int, backward: bool) -> Layer:
    """The experts' MLPs where each expert has the same number of rows, and they lie in order: three batched matmuls, nothing else."""
    experts, size, width = config.num_experts, config.hidden_size, config.intermediate_size
    share = max(rows * config.experts_per_token // experts, 1)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (experts, share, size), config.dtype)
    shapes = ((experts, width, size), (experts, width, size), (experts, size, width))
    weights = tuple(jax.random.normal(key, shape, config.dtype) * size**-0.5 for key, shape in zip(keys[1:], shapes, strict=True))

    def forward(weights: Any, x: Any) -> Any:
        gate, up = (jnp.einsum("emd,efd->emf", x, weight) for weight in weights[:2])
        return jnp.einsum("emf,edf->emd", jax.nn.silu(gate) * up, weights[2])

    def with_gradients(weights: Any, x: Any) -> Any:
        out, pull = jax.vjp(forward, weights, x)
        return out, pull(jnp.ones_like(out))

    compiled, compile_seconds = compile_program(jax.jit(with_gradients if backward else forward), weights, x)
    return Layer(
        functools.partial(compiled, weights, x),
        6 * experts * share * size * width * (3 if backward else 1),
        None,
        {"compile_seconds": compile_seconds, "temporary_bytes": temporary_bytes(compiled)},
    )


def describe_layer(layer: Layer, rows: int, timing: Timing, ceilings: dict[str, float]) -> dict[str, Any]:
    """A row of results."""
    return {
        "tokens": rows,
        **describe_rates(timing, ceilings, rows, layer.flops),
        "bytes_per_second": None if layer.bytes is None else layer.bytes / timing.median,
        "flops": layer.flops,
        **layer.facts,
    }


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.sharding import mesh_of

    mesh = None if arguments.mesh == MeshConfig() else mesh_of(arguments.mesh, replace(arguments.model, dispatch="auto"))
    kinds = arguments.dispatch or (ON_EXPERT_AXIS if mesh is not None and mesh.shape["expert"] > 1 else ON_ONE_DEVICE)
    rows = []
    ceilings = Ceilings(arguments.model.dtype)
    for tokens in arguments.tokens:
        for number, kind in enumerate(PASSES):
            layers = {name: compile_layer(replace(arguments.model, dispatch=cast(Any, name)), mesh, tokens, number == 1) for name in kinds}
            layers[BALANCED] = compile_balanced(arguments.model, tokens, number == 1)
            timings = time_calls({**{name: layer.run for name, layer in layers.items()}, **ceilings.functions}, arguments.repeats)
            reached = ceilings.results(timings)
            described = {name: describe_layer(layer, tokens, timings[name], reached) for name, layer in layers.items()}
            for name, row in described.items():
                balanced = row["flops_per_second"] / described[BALANCED]["flops_per_second"]
                rows.append(
                    {"name": f"{name}, {kind}, {tokens} tokens", "dispatch": name, "pass": kind, **row, "fraction_of_balanced": balanced}
                )
    rows = [row for row in rows if row["dispatch"] != BALANCED] + [row for row in rows if row["dispatch"] == BALANCED]
    report("moe", {**describe_shape(arguments.model, LAYER_FIELDS), "rows": rows}, arguments, COLUMNS)
