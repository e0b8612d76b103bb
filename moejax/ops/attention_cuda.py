"""Flash attention on NVIDIA GPUs, for rows that attend to themselves: cuDNN's, and tokamax's for Hopper where rows are packed.

cuDNN takes causality, a window and the length of each row, but packed documents only as a mask of [T, T]; tokamax's kernel takes for
every query the first key it may see, and so packed documents too.
"""

from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.ops.platforms import gpu_capability, import_tokamax

WIDEST_HEAD = {8: 128, 9: 256, 10: 256, 12: 128}  # cuDNN's, by the GPU's major compute capability
HOPPER = 9
RANGES_HEADS = (64, 128, 256)  # widths tokamax's kernel is used for
RANGES_BLOCK = 128  # rows of one block of it


def why_not(query: Any, is_causal_self: bool, by_ranges: bool) -> str | None:
    """Why no kernel on this machine's GPU can serve queries [B, T, N, H]; None where one can. `by_ranges` as `needs_ranges` says."""
    capability, width = gpu_capability(), query.shape[3]
    if capability is None:
        return "there is no NVIDIA GPU"
    if not is_causal_self:
        return "queries and keys are not the same positions of whole rows"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"they are {jnp.dtype(query.dtype).name}, and the kernels for bfloat16 and float16"
    widest = WIDEST_HEAD.get(int(capability), 0)
    if not widest:
        return f"the GPU has compute capability {capability}, and the kernels begin at 8.0"
    if not by_ranges:
        return f"heads of {width} are not a multiple of 8 up to {widest}" if width % 8 or width > widest else None
    if int(capability) != HOPPER:
        return f"packed rows take compute capability 9.0 (Hopper), and the GPU has {capability}"
    if width not in RANGES_HEADS or query.shape[1] % RANGES_BLOCK:
        return f"rows are packed, and heads of {width} or rows of {query.shape[1]} do not fit the kernel's blocks"
    return None


def needs_ranges(window: int | None, key_is_real: Any, segments: Any) -> bool:
    """Whether each query must be told its own keys: in packed rows, and where padding may lie beyond the window of the last real key."""
    return segments is not None or (window is not None and key_is_real is not None)


def attend_cuda(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    window: int | None = None,
    key_is_real: Bool[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention of a row to itself at scale 1/sqrt(H), differentiable; softmax in float32.

    `window` counts the keys a query sees, its own included. What a query that sees no key gets is finite and means nothing. Padding
    stands to the right, and the positions of a segment side by side: a row of which that is not true becomes NaN, rather than something
    that looks right. Raises UserError where tokamax is needed and missing.
    """
    if needs_ranges(window, key_is_real, segments):
        tokamax = import_tokamax("tokamax._src.ops.attention.pallas_mosaic_gpu", "attention over packed rows on an NVIDIA GPU")
        first, end, is_right = key_ranges((query.shape[0], query.shape[1]), window, key_is_real, segments)
        if key_is_real is None:  # the kernel knows by itself where causality ends
            mask = tokamax.Mask(k_start=first[:, None, :], is_causal=True)
        else:
            mask = tokamax.Mask(k_start=first[:, None, :], k_end=end[:, None, :])
        out = tokamax.PallasMosaicGpuFlashAttention()(query, key, value, mask=mask)
    else:
        lengths, is_right = None, None
        if key_is_real is not None:
            lengths, is_right = jnp.maximum(jnp.sum(key_is_real, axis=1, dtype=jnp.int32), 1), _is_to_the_left(key_is_real)
        seen = None if window is None else (window - 1, 0)
        out = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, key_value_seq_lengths=lengths, local_window_size=seen, implementation="cudnn"
        )
    return out if is_right is None else jnp.where(is_right[:, None, None, None], out, jnp.asarray(jnp.nan, out.dtype))


def _is_to_the_left(key_is_real: Bool[Array, "B T"]) -> Bool[Array, "B"]:
    return jnp.all(key_is_real[:, :-1] >= key_is_real[:, 1:], axis=1)


def key_ranges(
    shape: tuple[int, int], window: int | None, key_is_real: Bool[Array, "B T"] | None, segments: Int[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B"]]:
    """(first, end, whether that is the whole truth of a row): a query sees the keys from first to before end.

    A query that sees no key is given its own. It is not the truth where a segment lies in two places, or padding before what is real.
    """
    places = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    first, is_right = jnp.zeros(shape, jnp.int32), jnp.ones(shape[:1], jnp.bool_)
    if segments is not None:
        begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        first = lax.cummax(jnp.where(begins, places, 0), axis=1)
        ordered = jnp.sort(segments, axis=1)
        is_right = 1 + jnp.sum(ordered[:, 1:] != ordered[:, :-1], axis=1) == jnp.sum(begins, axis=1)
    if window is not None:
        first = jnp.maximum(first, places - (window - 1))
    if key_is_real is None:
        return first, places + 1, is_right
    end = jnp.minimum(places + 1, jnp.sum(key_is_real, axis=1, dtype=jnp.int32)[:, None])
    sees_nothing = first >= end
    first, end = jnp.where(sees_nothing, places, first), jnp.where(sees_nothing, places + 1, end)
    return first, end, is_right & _is_to_the_left(key_is_real)
