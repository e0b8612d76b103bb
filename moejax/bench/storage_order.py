"""Weights stored output-major ([out, in], as PyTorch) against input-major: the matmuls of training and decoding, in turns."""

from dataclasses import dataclass

import jax
from jax import lax
from jax import numpy as jnp

from moejax.bench.measure import time_calls
from moejax.bench.output import Output, report

# rows, inputs, outputs: projections, experts and head of a small model in training; projections of a large one in decoding
SHAPES = ((2048, 256, 256), (2048, 256, 896), (2048, 896, 256), (2048, 256, 32000), (1, 4096, 4096), (1, 4096, 14336), (8, 4096, 4096))


@dataclass(frozen=True)
class Arguments(Output):
    """Times y = x W and its gradients with W stored both ways."""

    repeats: int = 7


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    result = {}
    for rows, inputs, outputs in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x, gradient = jax.random.normal(keys[0], (rows, inputs)), jax.random.normal(keys[1], (rows, outputs))
        output_major = jax.random.normal(keys[2], (outputs, inputs))
        weights = {"output_major": (output_major, 1), "input_major": (jnp.array(output_major.T), 0)}
        functions = {}
        for name, (weight, contracted) in weights.items():

            def multiply(x, weight, contracted=contracted):
                return lax.dot_general(x, weight, (((1,), (contracted,)), ((), ())))

            forward = jax.jit(multiply)
            backward = jax.jit(jax.grad(lambda x, w, g, multiply=multiply: jnp.vdot(multiply(x, w), g), argnums=(0, 1)))
            functions[f"{name} forward"] = lambda f=forward, w=weight, x=x: f(x, w)
            if rows > 8:
                functions[f"{name} backward"] = lambda f=backward, w=weight, x=x, g=gradient: f(x, w, g)
        for name, timing in time_calls(functions, arguments.repeats).items():
            result[f"{rows}x{inputs}x{outputs} {name} ms"] = timing.median * 1e3
    report("storage_order", result, arguments)
