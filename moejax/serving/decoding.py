"""The compiled programs of decoding: prompts read into the cache, then several tokens a call, with stopping looked at on the device.

Each compiles once for a model and the shapes of its arguments; which shapes there are, `moejax.serving.engine` decides.
"""

import functools
from typing import Any

import flax.struct
import jax
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from moejax.model.cache import Cache
from moejax.model.transformer import Transformer, head_weight
from moejax.ops.matmul import project
from moejax.ops.sampling import History, Sampling, sample_tokens
from moejax.sharding import constrain

STEPS = 8  # tokens a row that one call makes at most
_SCORED = 64  # positions of a prompt whose log-probabilities over the vocabulary exist at a time


@flax.struct.dataclass
class Limits:
    """Where rows end: at an id of their own, or with a number of tokens."""

    stop_ids: Int[Array, "B ids"]  # padded with -1
    max_new_tokens: Int[Array, "B"]


@flax.struct.dataclass
class DecodeState:
    """What one call hands to the next; donated."""

    cache: Cache
    tokens: Int[Array, "B"]  # the newest of each row, not in the cache yet
    generated: Int[Array, "B"]  # tokens so far, an ending one included
    alive: Bool[Array, "B"]
    counts: Int[Array, "B V"] | None  # of generated tokens; None where no row has a penalty


@flax.struct.dataclass
class Scores:
    """Log-probabilities of tokens, and of the most likely ones, under the model itself: before bias, penalties and temperature."""

    chosen: Float[Array, "..."]
    top_ids: Int[Array, "... top"]
    top: Float[Array, "... top"]


def score(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], num_top: int | None) -> Scores | None:
    """The Scores of tokens [...] under logits [..., V]; None for None."""
    if num_top is None:
        return None
    logarithms = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logarithms, num_top)
    return Scores(jnp.take_along_axis(logarithms, tokens[..., None], axis=-1)[..., 0], ids, top)


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    model: Transformer, num_top: int | None, variables: Any, tokens: Array, mask: Array, cache: Cache
) -> tuple[Array, Cache, Scores | None]:
    """Reads prompts [B, T] (right-padded, `mask` 1 where real) into the cache.

    Also gives the logits, float32 [B, V], after each row's last token, and with num_top the Scores [B, T] of each position's next token.
    """
    outputs = model.apply(variables, tokens, mask=mask, cache=cache, return_logits=False)
    last = jnp.sum(mask != 0, axis=1) - 1
    head = head_weight(variables["params"]).astype(outputs.features.dtype)

    def logits_of(features: Array) -> Array:
        return project(features, head).astype(jnp.float32)

    logits = constrain(logits_of(outputs.features[jnp.arange(tokens.shape[0]), last]), model.mesh, None, None)
    scores = None
    if num_top is not None:
        following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        by_time = (outputs.features.swapaxes(0, 1), following.T)
        scores = jax.lax.map(lambda part: score(logits_of(part[0]), part[1], num_top), by_time, batch_size=_SCORED)
        scores = _replicate(jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), scores), model.mesh)
    assert outputs.cache is not None
    return logits, outputs.cache, scores


@functools.partial(jax.jit, static_argnums=(0, 1))
def choose_first(
    mesh: Mesh | None, num_top: int | None, logits: Array, sampling: Sampling, limits: Limits, in_prompt: Array | None
) -> tuple[Array, Array, Array | None, Scores | None]:
    """The first token of each row [B] from the prefill's logits, which rows go on [B], the counts of a DecodeState, and Scores."""
    rows = logits.shape[0]
    counts = None if in_prompt is None else jnp.zeros(logits.shape, jnp.int32)
    alive = limits.max_new_tokens > 0
    chosen = sample_tokens(logits, sampling, jnp.zeros(rows, jnp.int32), _history(in_prompt, counts))
    counts = None if counts is None else counts.at[jnp.arange(rows), chosen].add(1)
    result = (chosen, alive & ~_ends(chosen, jnp.ones(rows, jnp.int32), limits), counts, score(logits, chosen, num_top))
    return _replicate(result, mesh)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    model: Transformer,
    num_top: int | None,
    variables: Any,
    state: DecodeState,
    sampling: Sampling,
    limits: Limits,
    in_prompt: Array | None,
    steps: Array,
) -> tuple[DecodeState, Array, Scores | None]:
    """Up to `steps` (at most STEPS) more tokens a row, fewer where all rows have ended before: the state, tokens int32 [STEPS, B], -1 where
    a row had ended before, and with num_top their Scores. Rows that have ended neither move nor change."""
    rows = jnp.arange(state.tokens.shape[0])

    def step(carry: tuple[Array, DecodeState, Array, Scores | None]) -> tuple[Array, DecodeState, Array, Scores | None]:
        index, state, made, all_scores = carry
        outputs = model.apply(variables, state.tokens[:, None], mask=state.alive[:, None], cache=state.cache)
        logits = constrain(jnp.asarray(outputs.logits)[:, 0], model.mesh, None, None)
        chosen = sample_tokens(logits, sampling, state.generated, _history(in_prompt, state.counts))
        generated = state.generated + state.alive
        counts = None if state.counts is None else state.counts.at[rows, chosen].add(state.alive.astype(jnp.int32))
        made = made.at[index].set(jnp.where(state.alive, chosen, -1))
        scores = score(logits, chosen, num_top)
        all_scores = jax.tree.map(lambda buffer, new: buffer.at[index].set(new), all_scores, scores)
        alive = state.alive & ~_ends(chosen, generated, limits)
        assert outputs.cache is not None
        return index + 1, DecodeState(outputs.cache, chosen, generated, alive, counts), made, all_scores

    batch = state.tokens.shape[0]
    made = jnp.full((STEPS, batch), -1, jnp.int32)
    empty = None
    if num_top is not None:
        shape = (STEPS, batch, num_top)
        empty = Scores(jnp.zeros(shape[:2]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    start = (jnp.int32(0), state, made, empty)
    _, state, made, scores = jax.lax.while_loop(lambda carry: (carry[0] < steps) & jnp.any(carry[1].alive), step, start)
    small = (state.tokens, state.generated, state.alive, state.counts, made, scores)
    tokens, generated, alive, counts, made, scores = _replicate(small, model.mesh)
    return DecodeState(state.cache, tokens, generated, alive, counts), made, scores


def _history(in_prompt: Array | None, counts: Array | None) -> History | None:
    return None if in_prompt is None or counts is None else History(in_prompt, counts)


def _ends(tokens: Array, generated: Array, limits: Limits) -> Array:
    return jnp.any(tokens[:, None] == limits.stop_ids, axis=1) | (generated >= limits.max_new_tokens)


def _replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Whole on every device, as the host of every process reads it."""
    return jax.tree.map(lambda leaf: constrain(leaf, mesh, *(None,) * leaf.ndim), tree)
