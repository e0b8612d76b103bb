"""Decoding: prefill a batch of prompts, then one jitted step a token, the KV cache donated from step to step.

Prompts of different lengths stand left-aligned in one batch, each row at its own position; lengths are padded to buckets so
that a shape compiles once.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from moejax.config import UserError
from moejax.model.cache import KVCache, create_cache
from moejax.model.transformer import Transformer, head_weight
from moejax.ops.matmul import project
from moejax.ops.sampling import Sampling, sample_tokens
from moejax.sharding import constrain

BUCKET = 64  # prompt lengths and cache capacities are rounded up to a multiple of this, unless an engine is given another


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue prompts. temperature 0 is greedy; top_k 0 and top_p 1 are off; row i draws with seed + i."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (1 switches it off)")


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


@functools.partial(jax.jit, static_argnums=0)
def prefill(model: Transformer, variables: Any, tokens: Array, mask: Array, cache: KVCache) -> tuple[Array, Any]:
    """Reads prompts [B, T] (right-padded, `mask` 1 where real) into the cache; logits float32 [B, V] after each row's last token."""
    outputs = model.apply(variables, tokens, mask=mask, cache=cache, return_logits=False)
    last = jnp.sum(mask != 0, axis=1) - 1
    features = outputs.features[jnp.arange(tokens.shape[0]), last]
    head = head_weight(variables["params"]).astype(features.dtype)
    return constrain(project(features, head).astype(jnp.float32), model.mesh, None, None), outputs.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_step(model: Transformer, variables: Any, tokens: Array, cache: KVCache) -> tuple[Array, Any]:
    """One more token a row: tokens [B] -> logits float32 [B, V] and the cache, updated in place."""
    outputs = model.apply(variables, tokens[:, None], cache=cache)
    return constrain(jnp.asarray(outputs.logits)[:, 0], model.mesh, None, None), outputs.cache


@jax.jit
def pick_tokens(logits: Array, settings: Sampling, keys: Array, step: Array) -> Array:
    """The next token [B]; row b's draw at step n comes from its own key, folded with n."""
    return sample_tokens(logits, settings, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys))


class Engine:
    """Continues batches of token ids with one model; holds no state between calls beside compiled programs."""

    def __init__(self, model: Transformer, variables: Any, bucket: int = BUCKET) -> None:
        self.model = model
        self.variables = variables
        self.bucket = bucket

    def stream(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> Iterator[list[int | None]]:
        """Yields after every step the new token of each row, None for rows that have stopped; EOS itself is not yielded.

        Raises UserError for an empty prompt or a token outside the vocabulary, before anything runs.
        """
        config = self.model.config
        self._check(prompts, settings)
        if not prompts or settings.max_new_tokens == 0:
            return
        longest = max(map(len, prompts))
        width = round_up(longest, self.bucket)
        tokens = np.zeros((len(prompts), width), np.int32)
        mask = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        cache = create_cache(config, len(prompts), round_up(longest + settings.max_new_tokens, self.bucket), self.model.mesh)
        logits, cache = prefill(self.model, self.variables, tokens, mask, cache)
        sampling = self._sampling(len(prompts), settings)
        keys = jax.vmap(jax.random.key)(settings.seed + np.arange(len(prompts)))
        stops = () if settings.ignore_eos else config.eos_token_ids
        stopped = np.zeros(len(prompts), bool)
        for step in range(settings.max_new_tokens):
            chosen = pick_tokens(logits, sampling, keys, jnp.int32(step))
            if step + 1 < settings.max_new_tokens:  # dispatched before the host looks at the token
                logits, cache = decode_step(self.model, self.variables, chosen, cache)
            ids = np.asarray(chosen)
            stopped |= np.isin(ids, stops)
            if stopped.all():
                return
            yield [None if stop else int(token) for token, stop in zip(ids, stopped, strict=True)]

    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[int]]:
        """The new tokens of every prompt, EOS excluded."""
        results: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, settings):
            for result, token in zip(results, tokens, strict=True):
                if token is not None:
                    result.append(token)
        return results

    def _sampling(self, rows: int, settings: GenerationSettings) -> Sampling:
        return Sampling(
            jnp.full(rows, settings.temperature, jnp.float32),
            jnp.full(rows, settings.top_k, jnp.int32),
            jnp.full(rows, settings.top_p, jnp.float32),
        )

    def _check(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
        config = self.model.config
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {row} has no tokens; give at least one, such as the beginning-of-text id {config.bos_token_id}")
            outside = [token for token in prompt if not 0 <= token < config.vocab_size]
            if outside:
                raise UserError(f"prompt {row} holds token {outside[0]}, outside the model's vocabulary of {config.vocab_size}")
            if len(prompt) + settings.max_new_tokens > config.max_length:
                warnings.warn(
                    f"prompt {row}: {len(prompt)} tokens and {settings.max_new_tokens} new ones go past the {config.max_length} "
                    "positions this model is meant for; expect the text to degrade there",
                    stacklevel=4,
                )
