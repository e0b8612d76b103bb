"""The compiled programs of decoding: prompts read into the cache, then several tokens a call, with stopping looked at on the device.

Each compiles once for a model and the shapes of its arguments; which shapes there are, `moejax.serving.engine` decides.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from moejax.model.cache import Cache
from moejax.model.moe import RouterOutputs
from moejax.model.prefill import ChunkOutputs, apply_head, prefill_in_chunks
from moejax.model.transformer import Transformer
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


@flax.struct.dataclass
class Routed:
    """The experts that tokens went to, layer by layer (of those that hold experts), and their weights."""

    experts: Int[Array, "... layers A"]
    weights: Float[Array, "... layers A"]


class Asked(NamedTuple):
    """What is to be told of tokens beside themselves; a program of its own each."""

    num_top: int | None = None  # of how many most likely tokens; None: no log-probabilities
    routing: bool = False


class Details(NamedTuple):
    """What was asked for; None is what was not."""

    scores: Scores | None = None
    routing: Routed | None = None


def describe_routing(outputs: RouterOutputs) -> Routed:
    """[layers, B, T, A] of a pass as Routed [B, T, layers, A]."""
    return Routed(jnp.moveaxis(outputs.experts, 0, 2), jnp.moveaxis(outputs.weights, 0, 2))


def score(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], num_top: int | None) -> Scores | None:
    """The Scores of tokens [...] under logits [..., V]; None for None."""
    if num_top is None:
        return None
    logarithms = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logarithms, num_top)
    return Scores(jnp.take_along_axis(logarithms, tokens[..., None], axis=-1)[..., 0], ids, top)


def prefill(
    model: Transformer, asked: Asked, variables: Any, prompts: Sequence[Sequence[int]], cache: Cache, chunk: int
) -> tuple[Array, Cache, Details]:
    """Reads the prompts into the cache, `chunk` tokens of each at a time. Gives the logits after each one's last token, float32 [B, V], the
    cache, and the Details, on the host, of every position [B, T]: the Scores of its next token, and its own Routed."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), int(lengths.max()) + 1), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    kept: list[Details] = []

    def visit(start: int, outputs: ChunkOutputs) -> None:
        following = tokens[:, start + 1 : start + 1 + chunk]
        following = np.pad(following, ((0, 0), (0, chunk - following.shape[1])))
        kept.append(jax.device_get(_tell_chunk(model, asked.num_top, variables, outputs, following)))

    told = visit if asked != Asked() else None
    logits, cache = prefill_in_chunks(model, variables, tokens[:, :-1], lengths, cache, chunk, told, asked.routing)
    return logits, cache, jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *kept) if kept else Details()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tell_chunk(model: Transformer, num_top: int | None, variables: Any, outputs: ChunkOutputs, following: Array) -> Details:
    """A chunk's Details; its log-probabilities over the vocabulary are those of _SCORED positions at a time."""
    scores = None
    if num_top is not None:
        by_time = (outputs.features.swapaxes(0, 1), following.T)
        each = lambda part: score(apply_head(model, variables, part[0]), part[1], num_top)  # noqa: E731
        scores = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), jax.lax.map(each, by_time, batch_size=_SCORED))
    return _replicate(Details(scores, None if outputs.routing is None else describe_routing(outputs.routing)), model.mesh)


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
    asked: Asked,
    variables: Any,
    state: DecodeState,
    sampling: Sampling,
    limits: Limits,
    in_prompt: Array | None,
    steps: Array,
) -> tuple[DecodeState, Array, Details]:
    """Up to `steps` (at most STEPS) more tokens a row, fewer where all rows have ended before: the state, tokens int32 [STEPS, B], -1 where
    a row had ended before, and the Details [STEPS, B]: Scores of these tokens, Routed of those before, which the model read to find them.
    Rows that have ended neither move nor change."""
    rows = jnp.arange(state.tokens.shape[0])

    def step(carry: tuple[Array, DecodeState, Array, Details]) -> tuple[Array, DecodeState, Array, Details]:
        index, state, made, details = carry
        mask = state.alive[:, None]
        outputs = model.apply(variables, state.tokens[:, None], mask=mask, cache=state.cache, return_routing=asked.routing)
        logits = constrain(jnp.asarray(outputs.logits)[:, 0], model.mesh, None, None)
        chosen = sample_tokens(logits, sampling, state.generated, _history(in_prompt, state.counts))
        generated = state.generated + state.alive
        counts = None if state.counts is None else state.counts.at[rows, chosen].add(state.alive.astype(jnp.int32))
        made = made.at[index].set(jnp.where(state.alive, chosen, -1))
        routed = None if outputs.routing is None else jax.tree.map(lambda leaf: leaf[:, 0], describe_routing(outputs.routing))
        new = Details(score(logits, chosen, asked.num_top), routed)
        details = jax.tree.map(lambda buffer, leaf: buffer.at[index].set(leaf), details, new)
        alive = state.alive & ~_ends(chosen, generated, limits)
        assert outputs.cache is not None
        return index + 1, DecodeState(outputs.cache, chosen, generated, alive, counts), made, details

    batch = state.tokens.shape[0]
    made = jnp.full((STEPS, batch), -1, jnp.int32)
    start = (jnp.int32(0), state, made, _empty_details(model, asked, batch))
    _, state, made, details = jax.lax.while_loop(lambda carry: (carry[0] < steps) & jnp.any(carry[1].alive), step, start)
    small = (state.tokens, state.generated, state.alive, state.counts, made, details)
    tokens, generated, alive, counts, made, details = _replicate(small, model.mesh)
    return DecodeState(state.cache, tokens, generated, alive, counts), made, details


def _empty_details(model: Transformer, asked: Asked, batch: int) -> Details:
    """Room for the Details of STEPS steps."""
    scores = routed = None
    if asked.num_top is not None:
        shape = (STEPS, batch, asked.num_top)
        scores = Scores(jnp.zeros(shape[:2]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    if asked.routing and model.config.moe_layers:
        shape = (STEPS, batch, len(model.config.moe_layers), model.config.experts_per_token)
        routed = Routed(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    return Details(scores, routed)


def _history(in_prompt: Array | None, counts: Array | None) -> History | None:
    return None if in_prompt is None or counts is None else History(in_prompt, counts)


def _ends(tokens: Array, generated: Array, limits: Limits) -> Array:
    return jnp.any(tokens[:, None] == limits.stop_ids, axis=1) | (generated >= limits.max_new_tokens)


def _replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Whole on every device, as the host of every process reads it."""
    return jax.tree.map(lambda leaf: constrain(leaf, mesh, *(None,) * leaf.ndim), tree)
