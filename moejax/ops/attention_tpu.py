"""Flash attention on TPUs: jax's splash attention, for rows that attend to themselves (training, scoring).

Neither scores nor a mask of [T, T] exist: blocks that causality or the window leave empty are skipped, the others masked as they are
computed. Query heads that share a key head read it in place.
"""

from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

LANES = 128  # a TPU's registers are this wide: blocks of rows come in multiples, and narrower heads are filled up with zeros
BLOCKS = (512, 256, 128)  # queries and keys of a block: the largest that divides the row


def why_not(query: Any, is_causal_self: bool) -> str | None:
    """Why the kernel cannot serve queries [B, T, N, H]; None where it can."""
    if not is_causal_self:
        return "queries and keys are not the same positions of whole rows"
    if query.dtype != jnp.bfloat16:
        return f"they are {jnp.dtype(query.dtype).name}, and the kernel multiplies in bfloat16"
    if query.shape[1] % LANES:
        return f"rows of {query.shape[1]} positions are no multiple of {LANES}"
    return None


def attend_tpu(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    window: int | None = None,
    key_is_real: Bool[Array, "B T"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention of a row to itself at scale 1/sqrt(H), differentiable; softmax in float32.

    `window` counts the keys a query sees, its own included. What a query that sees no key gets is finite and means nothing.
    `interpret` runs the kernel's steps on any device, slowly: for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, num_heads, width = query.shape[1:]
    block = next(size for size in BLOCKS if time % size == 0)
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    seen = masks.CausalMask((time, time)) if window is None else masks.LocalMask((time, time), (window - 1, 0), 0)
    kernel: Any = splash.make_splash_mha(
        mask=masks.MultiHeadMask([seen] * num_heads), head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret
    )
    scaled = query * jnp.asarray(width**-0.5, query.dtype)  # the kernel multiplies by nothing
    q, k, v = (_widen(part.transpose(0, 2, 1, 3)) for part in (scaled, key, value))
    out = jax.vmap(kernel)(q, k, v, _segments(splash, key_is_real, query_segments, key_segments))
    return out[..., :width].transpose(0, 2, 1, 3)


def _widen(part: Array) -> Array:
    """Heads filled up with zeros to whole lanes: they add nothing to a score, and give columns that are cut off."""
    missing = -part.shape[-1] % LANES
    return jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else part


def _segments(splash: Any, key_is_real: Array | None, query_segments: Array | None, key_segments: Array | None) -> Any:
    """Who may see whom beside order and window, as numbers that must be equal; a key that is none has a number of its own."""
    if query_segments is None or key_segments is None:
        if key_is_real is None:
            return None
        query_segments = key_segments = jnp.zeros(key_is_real.shape, jnp.int32)
    if key_is_real is not None:
        key_segments = jnp.where(key_is_real, key_segments, jnp.iinfo(jnp.int32).min)
    return splash.SegmentIds(q=query_segments, kv=key_segments)
