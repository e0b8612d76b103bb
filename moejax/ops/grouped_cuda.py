"""Grouped matmul on NVIDIA GPUs, by tokamax's Mosaic kernels for Hopper; forward, gradient of rows, gradient of weights.

`lax.ragged_dot` is not used there: XLA makes it one dense matmul a group over all rows, E times the work and the memory.
"""

from typing import Any, Literal, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from moejax.checks import UserError
from moejax.ops.platforms import gpu_capability, import_tokamax

# Both widths must be multiples: the kernels step through the inner one in blocks of this many, and drop what is left.
WIDTH_MULTIPLE = 128
ROW_MULTIPLE = 64  # rows are padded to a multiple, which the kernels' copies of tiles ask for

Kind = Literal["rows", "row_gradient", "weight_gradient"]


class _Contraction(NamedTuple):
    """Which axes are summed over, and which axis of the right side counts groups (none: the rows are summed over, group by group)."""

    left: int
    right: int
    groups: tuple[int, ...]


_CONTRACTIONS: dict[str, _Contraction] = {
    "rows": _Contraction(1, 2, (0,)),  # x [M, in], weights [E, out, in]
    "row_gradient": _Contraction(1, 1, (0,)),  # gradient [M, out], weights [E, out, in]
    "weight_gradient": _Contraction(0, 0, ()),  # gradient [M, out], x [M, in]
}


def why_not(inside: int, outside: int, dtype: Any) -> str | None:
    """Why the kernels cannot multiply rows of width `inside` into ones of width `outside` on this machine's GPU; None where they can."""
    capability = gpu_capability()
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"they are {jnp.dtype(dtype).name}, and the kernels for bfloat16 and float16"
    if inside % WIDTH_MULTIPLE or outside % WIDTH_MULTIPLE:
        return f"widths {inside} and {outside} are not both multiples of {WIDTH_MULTIPLE}"
    if capability is not None and not 9.0 <= capability < 10.0:
        return f"the GPU has compute capability {capability}, and the kernels are for 9.0 (Hopper)"
    return None


def multiply(kind: Kind, left: Array, right: Array, group_sizes: Array) -> Array:
    """One of the three products of a grouped matmul; results of rows that belong to no group are zero.

    Raises UserError where tokamax is missing, and where its kernels refuse what they are given: never another way in silence.
    """
    module = import_tokamax(
        "tokamax._src.ops.ragged_dot.pallas_mosaic_gpu",
        "a grouped matmul in bfloat16 on an NVIDIA GPU (--model.dtype float32 and --model.dispatch dense do without, slowly)",
    )
    num_rows = left.shape[0]
    padding = ((0, -num_rows % ROW_MULTIPLE), (0, 0))
    left = jnp.pad(left, padding)
    right = jnp.pad(right, padding) if kind == "weight_gradient" else right
    contraction = _CONTRACTIONS[kind]
    arguments = {
        "group_sizes": group_sizes,
        "ragged_dot_dimension_numbers": lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([contraction.left], [contraction.right]), ([], [])),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=list(contraction.groups),
        ),
        "preferred_element_type": left.dtype,
    }
    kernel = module.PallasMosaicGpuRaggedDot()
    try:
        bound = kernel.bind(left, right, **arguments)
        config = bound.default_config  # measured by tokamax for this shape, else its rule
        if kind != "weight_gradient" and left.shape[1] % config.block_k:
            config = bound.heuristics_config  # blocks of WIDTH_MULTIPLE
        out = kernel.replace(config=config)(left, right, **arguments)
    except (NotImplementedError, ValueError) as error:
        shapes = f"{left.shape} by {right.shape} in {left.dtype.name}"
        raise UserError(
            f"tokamax refuses the grouped matmul of {shapes}: {' '.join(str(error).split())}; use --model.dispatch dense"
        ) from error
    if kind == "weight_gradient":
        return out
    # The kernels leave the rows of no group as the memory was: one NaN there would spread over the next gradient of weights.
    mine = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(mine[:, None], out[:num_rows], jnp.zeros((), out.dtype))


def result_shape(kind: Kind, left: Array, right: Array, group_sizes: Array) -> jax.ShapeDtypeStruct:
    """Shape and type of `multiply`'s result."""
    if kind == "weight_gradient":
        return jax.ShapeDtypeStruct((group_sizes.shape[0], left.shape[1], right.shape[1]), left.dtype)
    return jax.ShapeDtypeStruct((left.shape[0], right.shape[1 if kind == "rows" else 2]), left.dtype)
