"""The weights' gradient of a grouped matmul on TPUs, by jax's megablox kernel.

`lax.ragged_dot_general` is one kernel on a TPU where rows meet their group's weight, but where rows are summed over, group by group, XLA
multiplies every row for every group and masks: E times the work, seen in the compiled program of an 8 x 7B step.
"""

from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

TILES = (512, 1024, 1024)  # rows, and the two widths: accumulated in 4 MB of the core's memory
LANES = 128


def why_not(inside: int, outside: int, dtype: Any) -> str | None:
    """Why the kernel cannot serve rows of these widths; None where it can."""
    if dtype != jnp.bfloat16:
        return f"they are {jnp.dtype(dtype).name}, and the kernel multiplies in bfloat16"
    if inside % LANES or outside % LANES:
        return f"widths {inside} and {outside} are not both multiples of {LANES}"
    return None


def weight_gradient(gradient: Array, x: Array, group_sizes: Array, interpret: bool = False) -> Array:
    """Sum over a group's rows of gradient [M, out] times x [M, in], for every group: [E, out, in]; zeros for a group without rows.

    Rows behind the last group count nowhere. `interpret` runs the kernel's steps on any device, slowly: for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    missing = ((0, -x.shape[0] % TILES[0]), (0, 0))
    gradient, x = jnp.pad(gradient, missing), jnp.pad(x, missing)
    tiles = (TILES[0], min(TILES[1], gradient.shape[1]), min(TILES[2], x.shape[1]))
    return tgmm(gradient.T, x, group_sizes, preferred_element_type=x.dtype, tiling=tiles, interpret=interpret)


def result_shape(gradient: Array, x: Array, group_sizes: Array) -> jax.ShapeDtypeStruct:
    """Shape and type of `weight_gradient`'s result."""
    return jax.ShapeDtypeStruct((group_sizes.shape[0], gradient.shape[1], x.shape[1]), x.dtype)
