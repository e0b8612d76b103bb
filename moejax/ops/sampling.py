"""The next token from logits. Settings are arrays, one entry per row, so that rows with different wishes share one program.

The order is that of vLLM's sampler (vllm/v1/sample/sampler.py): logit bias; repetition, frequency and presence penalty; with
temperature 0 the largest logit is taken here; temperature; min-p; top-k; top-p; the draw. A row's draw depends on its logits, its seed
and its step alone: noise belongs to tokens, not to ranks or rows, so neither company nor place in the batch moves it.
"""

from typing import NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int, UInt32


class Sampling(NamedTuple):
    """Per-row settings. What is off: temperature 0 (greedy), top_k 0, top_p 1, min_p 0, penalties 1, 0 and 0, bias ids of V or more."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    bias_ids: Int[Array, "B J"]  # padded with V
    bias_values: Float[Array, "B J"]
    seed: UInt32[Array, "B"]


class History(NamedTuple):
    """What the penalties look at; needed only where a row has one."""

    in_prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]  # how often each token was generated


def add_bias(logits: Float[Array, "B V"], ids: Int[Array, "B J"], values: Float[Array, "B J"]) -> Float[Array, "B V"]:
    """Adds each row's values to the logits of its ids; ids outside the vocabulary are padding."""
    if not ids.shape[1]:
        return logits
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].add(values, mode="drop")


def penalize(logits: Float[Array, "B V"], settings: Sampling, history: History) -> Float[Array, "B V"]:
    """The three penalties.

    Repetition, for tokens of the prompt or generated (CTRL, Keskar et al. 2019, as transformers' RepetitionPenaltyLogitsProcessor has it):
    positive logits are divided by it, negative ones multiplied. Then, for generated tokens alone (OpenAI's API, and vLLM's):
    logit - count * frequency - (count > 0) * presence.
    """
    repetition = jnp.where(history.in_prompt | (history.counts > 0), settings.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - history.counts * settings.frequency_penalty[:, None]
    return logits - (history.counts > 0) * settings.presence_penalty[:, None]


def filter_logits(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"], min_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """-inf for tokens below min_p times the largest probability; then outside the top_k largest; then outside the smallest set whose
    probability, among those that are left, reaches top_p (nucleus sampling, Holtzman et al. 2020).

    The most likely token always stays; ties at the k-th place go to the lower id.
    """
    below = logits < jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]  # min_p 0: below -inf, which nothing is
    logits = jnp.where(below, -jnp.inf, logits)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, :]
    keep = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probability = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1.0)
    keep |= rank == 0
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros(logits.shape, bool).at[rows, order].set(keep, unique_indices=True)
    return jnp.where(kept, logits, -jnp.inf)


def sample_tokens(
    logits: Float[Array, "B V"], settings: Sampling, steps: Int[Array, "B"], history: History | None = None
) -> Int[Array, "B"]:
    """One token a row, int32; row b's is draw number steps[b] of its seed. Without a history no penalty is applied.

    Nothing is drawn where all rows are greedy, and nothing sorted where no row filters.
    """
    logits = add_bias(logits.astype(jnp.float32), settings.bias_ids, settings.bias_values)
    logits = logits if history is None else penalize(logits, settings, history)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = settings.temperature > 0

    def draw():
        # Greedy rows, which the last line leaves alone, are divided by 1.
        scaled = logits / jnp.where(draws, settings.temperature, 1.0)[:, None]
        filters = draws & ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0))
        kept = jax.lax.cond(jnp.any(filters), lambda: filter_logits(scaled, settings.top_k, settings.top_p, settings.min_p), lambda: scaled)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(settings.seed, steps)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(draws, drawn, greedy)

    return jax.lax.cond(jnp.any(draws), draw, lambda: greedy)
