"""What `python -m moejax.bench gpu` checks and times, one function an item; each returns rows of plain numbers.

Every way of doing a thing runs by itself: what fails is an `error` in its row, and the other rows are measured.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from moejax.bench.measure import compile_program, temporary_bytes
from moejax.config import ModelConfig
from moejax.families.arctic import ARCTIC_480B
from moejax.families.mixtral import MIXTRAL_8X7B
from moejax.ops import attention_cuda, dispatch, grouped
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.grouped import SPARE_ROWS
from moejax.ops.routing import Routing

Row = dict[str, Any]
CHAIN = 16  # calls in one program, one after another, where a call alone would measure its launch


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are for one GPU with 80 GB."""

    experts: tuple[tuple[str, int, int, int], ...] = (("mixtral", 8, 4096, 14_336), ("arctic", 128, 7168, 4864))  # name, E, D, F
    rows: tuple[int, ...] = (16, 64, 512, 8192)  # of a grouped matmul: choices of experts
    tokens: int = 8192  # of an MoE layer and of attention in training
    length: int = 4096
    heads: tuple[int, int, int] = (32, 8, 128)  # query heads, key heads, width
    decode_batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (1024, 8192, 32_768)
    # Parameters and AdamW's state take 10 bytes a parameter, gradients 2: 3 layers of Mixtral, 1 of Arctic with 32 of its experts.
    models: tuple[tuple[str, ModelConfig], ...] = (
        ("mixtral", replace(MIXTRAL_8X7B, num_layers=3)),
        ("arctic", replace(ARCTIC_480B, num_layers=1, moe_every=1, num_experts=32, dtype="bfloat16", param_dtype="bfloat16")),
    )
    remat: tuple[str, ...] = ("full", "dots", "none")
    seconds: float = 0.2  # a thing is repeated for about as long


def attempt(row: Row, function: Callable[[], Row]) -> Row:
    """The row with what the function found; an exception is the row's `error`, in one line."""
    try:
        return row | function()
    except Exception as error:
        return row | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def measure(function: Callable[..., Any], *arguments: Any, seconds: float, flops: float = 0, read: float = 0, calls: int = 1) -> Row:
    """Compiles and times; `flops` and `read` (bytes) are of one call, and a run of the program makes `calls` of them."""
    compiled, compile_seconds = compile_program(jax.jit(function), *arguments)
    row: Row = {"compile_seconds": compile_seconds, "temporary_bytes": temporary_bytes(compiled)}
    for _ in range(2):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        once = time.perf_counter() - started
    repeats = int(min(max(seconds / max(once, 1e-6), 3), 1000))
    started = time.perf_counter()
    for _ in range(repeats):
        out = compiled(*arguments)
    jax.block_until_ready(out)
    row["microseconds"] = (time.perf_counter() - started) / (repeats * calls) * 1e6
    if flops:
        row["tflops_per_second"] = flops / row["microseconds"] / 1e6
    if read:
        row["gigabytes_per_second"] = read / row["microseconds"] / 1e3
    return row


def chain(function: Callable[..., Array], x: Array, *others: Any) -> Array:
    """CHAIN calls of function(x, *others), each waiting for the one before."""

    def step(carry, _):
        out = function(x + carry.astype(x.dtype), *others)
        return jnp.max(out).astype(jnp.float32) * 1e-30, None

    return lax.scan(step, jnp.float32(0.0), None, length=CHAIN)[0]


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16) -> Array:
    """Normally distributed numbers, made on the device."""
    make = jax.jit(lambda key: (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype))
    return make(jax.random.key(seed))


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude, over all arrays of a tree; not a number where the result has one."""
    errors = [
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.maximum(jnp.max(jnp.abs(b.astype(jnp.float32))), 1e-9))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    return float(np.max(errors))


def with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
    """(value, gradients of its sum of squares) by all arguments that are floating point."""

    def run(*arguments: Any) -> Any:
        floating = [place for place, argument in enumerate(arguments) if jnp.issubdtype(argument.dtype, jnp.floating)]
        return jax.value_and_grad(lambda *given: jnp.sum(function(*given).astype(jnp.float32) ** 2), tuple(floating))(*arguments)

    return run


def even_sizes(rows: int, experts: int) -> Array:
    """Rows by expert, as evenly as they go."""
    return jnp.asarray([rows // experts + (expert < rows % experts) for expert in range(experts)], jnp.int32)


def ways_of_grouped_matmul() -> dict[str, Callable[..., Array]]:
    """Ours as training takes it, XLA's own, jax's Hopper example with the weight as it lies, and every row through every expert."""

    def example(x: Array, weights: Array, sizes: Array) -> Array:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

        return ragged_dot(
            x, weights, group_sizes=sizes, transpose_rhs=True, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8
        )

    return {
        "moejax": grouped.grouped_matmul,
        "lax.ragged_dot": grouped.grouped_matmul_ragged,
        "jax example": example,
        "loop over blocks": grouped.grouped_matmul_blocked,
        "einsum over all": grouped.grouped_matmul_reference,
    }


def check_grouped(sizes: Sizes) -> Iterator[Row]:
    """Values and gradients against every row through every expert in float32, with empty and uneven groups."""
    width = 256
    x, weights = normal(0, (640, width)), normal(1, (4, 384, width), width**-0.5)
    groups = jnp.asarray([0, 300, 17, 323], jnp.int32)
    for name, function in ways_of_grouped_matmul().items():
        changed = (lambda function: function) if name == "jax example" else with_gradients  # the example has no gradient
        yield attempt({"way": name}, functools.partial(_compare, changed, function, grouped.grouped_matmul_reference, x, weights, groups))


def _compare(changed: Callable[..., Any], function: Any, reference: Any, *arguments: Array) -> Row:
    wide = [part.astype(jnp.float32) if jnp.issubdtype(part.dtype, jnp.floating) else part for part in arguments]
    return {"relative_error": relative_error(jax.jit(changed(function))(*arguments), jax.jit(changed(reference))(*wide))}


def time_grouped(sizes: Sizes) -> Iterator[Row]:
    """A grouped matmul of D into F, forward, and forward with both gradients at the largest number of rows."""
    for shape, experts, inside, outside in sizes.experts:
        weights = normal(1, (experts, outside, inside), inside**-0.5)
        for rows in sizes.rows:
            x, groups, flops = normal(0, (rows, inside)), even_sizes(rows, experts), 2 * rows * inside * outside
            read = 2 * min(rows, experts) * inside * outside
            for name, function in ways_of_grouped_matmul().items():
                if name == "einsum over all" and 2 * rows * experts * outside > 12e9:
                    continue  # its result would not fit
                row = {"shape": shape, "rows": rows, "way": name, "pass": "forward"}
                run = functools.partial(measure, function, x, weights, groups, seconds=sizes.seconds, flops=flops, read=read)
                yield attempt(row, run)
                if rows == max(sizes.rows) and name in ("moejax", "lax.ragged_dot"):
                    both = functools.partial(measure, with_gradients(function), x, weights, groups, seconds=sizes.seconds, flops=3 * flops)
                    yield attempt(row | {"pass": "forward and backward"}, both)
        del weights


def time_moe(sizes: Sizes) -> Iterator[Row]:
    """An MoE layer's experts, from tokens to weighted sums, beside the same FLOP in dense matmuls."""
    shape, experts, inside, outside = sizes.experts[0]
    x = normal(0, (sizes.tokens, inside))
    gate, up = (normal(seed, (experts, outside, inside), inside**-0.5) for seed in (1, 2))
    down = normal(3, (experts, inside, outside), outside**-0.5)
    chosen = jax.vmap(lambda key: jax.random.permutation(key, experts)[:2])(jax.random.split(jax.random.key(4), sizes.tokens))
    routing = Routing(jnp.full(chosen.shape, 0.5, jnp.float32), chosen.astype(jnp.int32))

    def sparse(x: Array, gate: Array, up: Array, down: Array) -> Array:
        return dispatch.apply_experts_sorted(x, routing, ExpertWeights(gate, up, down))

    def dense(x: Array, gate: Array, up: Array, down: Array) -> Array:
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    ways: dict[str, tuple[Callable[..., Array], tuple[Array, ...]]] = {
        "experts, sorted": (sparse, (x, gate, up, down)),
        "dense, the same FLOP": (dense, (jnp.concatenate([x, x]), gate[0], up[0], down[0])),
    }
    flops = 2 * sizes.tokens * 2 * 3 * inside * outside
    for name, (function, arguments) in ways.items():
        for kind, run, factor in (("forward", function, 1), ("forward and backward", with_gradients(function), 3)):
            timed = functools.partial(measure, run, *arguments, seconds=sizes.seconds, flops=factor * flops)
            yield attempt({"shape": shape, "tokens": sizes.tokens, "way": name, "pass": kind}, timed)


def attend_all_scores(query: Array, key: Array, value: Array) -> Array:
    """Causal attention, all scores at once."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=query.shape[1] == key.shape[1], implementation="xla")


def ways_of_attention(segments: Array) -> dict[str, Callable[..., Array]]:
    """cuDNN on whole rows, tokamax on packed ones (here one document each), and all scores at once."""
    return {
        "cudnn": attention_cuda.attend_cuda,
        "tokamax": functools.partial(attention_cuda.attend_cuda, segments=segments),
        "all scores": attend_all_scores,
    }


def check_attention(sizes: Sizes) -> Iterator[Row]:
    """Values and gradients against all scores in float32."""
    heads, kv_heads, width = sizes.heads
    length = min(sizes.length, 512)
    parts = [normal(seed, (2, length, count, width)) for seed, count in enumerate((heads, kv_heads, kv_heads))]
    for name, function in ways_of_attention(jnp.ones((2, length), jnp.int32)).items():
        yield attempt({"way": name}, functools.partial(_compare, with_gradients, function, attend_all_scores, *parts))


def time_attention(sizes: Sizes) -> Iterator[Row]:
    """Attention of training, forward and with gradients; FLOP counted causally."""
    heads, kv_heads, width = sizes.heads
    batch = sizes.tokens // sizes.length
    parts = [normal(seed, (batch, sizes.length, count, width)) for seed, count in enumerate((heads, kv_heads, kv_heads))]
    flops = batch * heads * width * 4 * sizes.length * (sizes.length + 1) // 2
    for name, function in ways_of_attention(jnp.ones((batch, sizes.length), jnp.int32)).items():
        for kind, run, factor in (("forward", function, 1), ("forward and backward", with_gradients(function), 3)):
            timed = functools.partial(measure, run, *parts, seconds=sizes.seconds, flops=factor * flops)
            yield attempt({"batch": batch, "length": sizes.length, "way": name, "pass": kind}, timed)


def time_decode_attention(sizes: Sizes) -> Iterator[Row]:
    """One query a row over a full cache; bytes are the cache's."""
    heads, kv_heads, width = sizes.heads
    for context in sizes.contexts:
        for batch in sizes.decode_batches:
            query = normal(0, (batch, 1, heads, width))
            keys, values = (normal(seed, (batch, context, kv_heads, width)) for seed in (1, 2))
            lengths = jnp.full((batch,), context, jnp.int32)
            cudnn = functools.partial(jax.nn.dot_product_attention, key_value_seq_lengths=lengths, implementation="cudnn")
            for name, function in {"cudnn": cudnn, "all scores": attend_all_scores}.items():
                timed = functools.partial(
                    measure,
                    functools.partial(chain, function),
                    query,
                    keys,
                    values,
                    seconds=sizes.seconds,
                    read=2 * keys.nbytes,
                    calls=CHAIN,
                )
                yield attempt({"context": context, "batch": batch, "way": name}, timed)


def ways_of_decoding() -> dict[str, Callable[..., Array]]:
    """Chosen experts' weights [E, F, D] times one token x [D]: [A, F]."""

    def slice_and(multiply: Callable[[Array, Array], Array]) -> Callable[..., Array]:
        return lambda x, weights, chosen: jnp.stack(
            [multiply(lax.dynamic_index_in_dim(weights, index, keepdims=False), x) for index in chosen]
        )

    def sum_products(weight: Array, x: Array) -> Array:
        return jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32)[None, :], axis=1).astype(x.dtype)

    return {
        "take, einsum": lambda x, weights, chosen: jnp.einsum("afd,d->af", jnp.take(weights, chosen, axis=0), x),
        "slice, dot": slice_and(jnp.dot),
        "slice, multiply, sum": slice_and(sum_products),
        "grouped matmul": lambda x, weights, chosen: grouped.grouped_matmul(
            jnp.broadcast_to(x, (chosen.shape[0] + SPARE_ROWS, x.shape[0])),
            weights,
            jnp.bincount(chosen, length=weights.shape[0]).astype(jnp.int32),
            SPARE_ROWS,
        ),
    }


def time_decoding(sizes: Sizes) -> Iterator[Row]:
    """One matmul of an expert layer at batch 1: bytes are those of the two chosen experts."""
    for shape, experts, inside, outside in sizes.experts:
        weights, x = normal(1, (experts, outside, inside), inside**-0.5), normal(0, (inside,))
        chosen = jnp.asarray([1, experts - 1], jnp.int32)
        for name, function in ways_of_decoding().items():
            timed = functools.partial(
                measure,
                functools.partial(chain, function),
                x,
                weights,
                chosen,
                seconds=sizes.seconds,
                read=2 * weights[0].nbytes,
                calls=CHAIN,
            )
            yield attempt({"shape": shape, "way": name}, timed)
        del weights


def time_training(sizes: Sizes) -> Iterator[Row]:
    """Whole training steps: AdamW, packed rows, each remat policy."""
    for name, config in sizes.models:
        for remat in sizes.remat:
            row = {"model": name, "layers": config.num_layers, "experts": config.num_experts, "remat": remat}
            yield attempt(row, functools.partial(_time_step, replace(config, remat=remat), sizes))


def _time_step(config: ModelConfig, sizes: Sizes) -> Row:
    from moejax.bench.train import compile_step
    from moejax.families.flops import count_flops
    from moejax.training.hardware import find_peak

    shape = (sizes.tokens // sizes.length, sizes.length)
    step = compile_step(config, *shape)
    row: Row = {"compile_seconds": step.compile_seconds, "temporary_bytes": step.temporary_bytes}
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        loss = float(step.run())
        seconds.append(time.perf_counter() - started)
    median, flops = float(np.median(seconds[2:])), count_flops(config, *shape)
    peak = find_peak(jax.devices()[:1], config.dtype).flops_per_second
    row |= {"microseconds": median * 1e6, "tokens_per_second": shape[0] * shape[1] / median, "loss": loss}
    return row | {"tflops_per_second": flops / median / 1e12, "fraction_of_peak": flops / median / peak}


ITEMS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "check_grouped": check_grouped,
    "check_attention": check_attention,
    "training": time_training,
    "grouped": time_grouped,
    "moe": time_moe,
    "attention": time_attention,
    "decode_attention": time_decode_attention,
    "decoding": time_decoding,
}
