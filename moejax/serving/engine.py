"""Decoding a batch: prompts are read into the cache, then tokens are made several a call, the cache donated from call to call.

Prompts of different lengths stand left-aligned in one batch, each row at its own position, with its own settings and its own end.
Batch, prompt length and cache capacity are rounded up to buckets, so that few shapes are compiled, each once in a process.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig, UserError
from moejax.generation_config import GenerationSettings
from moejax.model.cache import create_cache
from moejax.model.expert_dispatch import choose_dispatch
from moejax.model.layers import turn_kernels
from moejax.model.transformer import Transformer, unstack_layers
from moejax.ops.sampling import Sampling
from moejax.serving.decoding import STEPS, Asked, DecodeState, Details, Limits, choose_first, decode, prefill
from moejax.serving.generation import Generation, Row
from moejax.serving.stopping import StoppingDecoder

BUCKET = 64  # prompt lengths and cache capacities are rounded up to multiples of this, unless an engine is given another
SHORTEST = 16  # prompt lengths below a bucket no larger than that are rounded up to powers of two from here on
CHUNK = 512  # tokens of each prompt that one call reads at most
UNROLLED_LAYERS = 16  # on CPU, models of up to as many layers are decoded with their layers unrolled
_SECONDS_A_CALL = 0.2  # how long text may stay away, and Ctrl-C wait, while a call makes several tokens


class Engine:
    """Continues batches of token ids with one model; holds no state between calls beside compiled programs.

    On CPU, decoding through a scan over stacked layers copies every layer's weights at every step, and matmuls of few rows take longer
    by output-major weights. So the weights of a model of up to UNROLLED_LAYERS layers on one CPU device are unstacked and turned once,
    here: all of them but the embedding a second time, for as long as the engine lives.
    """

    def __init__(
        self,
        model: Transformer,
        variables: Any,
        bucket: int = BUCKET,
        tokenizer: Any = None,
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
        chunk: int = CHUNK,
    ) -> None:
        self.bucket = bucket
        self.tokenizer = tokenizer
        self.cache = cache
        self.chunk = chunk
        config = model.config
        if config.num_layers <= UNROLLED_LAYERS and model.mesh is None and jax.default_backend() == "cpu":
            variables = {**variables, "params": _prepare_for_cpu(config, variables["params"])}
            model = Transformer(dataclasses.replace(config, scan_layers=False))
        self.model = model
        self.variables = variables

    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings | Sequence[GenerationSettings]) -> list[list[int]]:
        """The new tokens of every prompt, EOS excluded."""
        return [generation.tokens for generation in self.complete(prompts, settings)]

    def complete(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings | Sequence[GenerationSettings], return_routing: bool = False
    ) -> list[Generation]:
        """The Generation of every prompt; see `follow`."""
        return list(self.follow(prompts, settings, return_routing=return_routing))[-1]  # a list of the same objects again and again

    def stream(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings | Sequence[GenerationSettings]
    ) -> Iterator[list[int | None]]:
        """Yields after every step the new token of each row, None for rows that have ended; EOS itself is not yielded."""
        known = [0] * len(prompts)
        for generations in self.follow(prompts, settings):
            tokens = [row.tokens[-1] if len(row.tokens) > count else None for row, count in zip(generations, known, strict=True)]
            known = [len(row.tokens) for row in generations]
            if any(token is not None for token in tokens):
                yield tokens

    def follow(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings | Sequence[GenerationSettings],
        is_start: bool = False,
        return_routing: bool = False,
    ) -> Iterator[list[Generation]]:
        """Yields the rows' Generations after every step, always the same objects, and what they hold grows; once where nothing is to do.

        One GenerationSettings is for all prompts, and row i then draws with seed + i; several are one per prompt. Text is made where the
        engine has a tokenizer; `is_start` says that it begins anew, with no space before it. `return_routing` fills that field. Raises
        UserError, before anything runs, for an empty prompt, ids outside the vocabulary, stop strings without a tokenizer.
        """
        several = spread_settings(settings, len(prompts))
        self._check(prompts, several)
        if not prompts:
            yield []
            return
        rows = [self._start_row(prompt, one, is_start) for prompt, one in zip(prompts, several, strict=True)]
        generations = [row.generation for row in rows]
        if all(row.ended and row.settings.prompt_logprobs is None for row in rows) and not return_routing:
            yield generations
            return
        for tokens, details in self._run(rows, return_routing):
            for place, row in enumerate(rows):
                if not row.ended:
                    row.add(int(tokens[place]), details, place)
            yield generations
        if all(row.settings.max_new_tokens == 0 for row in rows):
            yield generations

    def _start_row(self, prompt: Sequence[int], settings: GenerationSettings, is_start: bool) -> Row:
        stop_ids = settings.stop_token_ids + (() if settings.ignore_eos else self.model.config.eos_token_ids)
        decoder = None if self.tokenizer is None else StoppingDecoder(self.tokenizer, settings.stop, is_start)
        return Row(prompt, settings, stop_ids, decoder)

    def _run(self, rows: list[Row], return_routing: bool) -> Iterator[tuple[np.ndarray, Details]]:
        """Yields (tokens [B], Details [B]) of every step, until all rows have ended."""
        model, variables, vocabulary = self.model, self.variables, self.model.config.vocab_size
        several = [row.settings for row in rows]
        batch, width, capacity = self.shapes([len(row.prompt) for row in rows], [one.max_new_tokens for one in several])
        sampling, limits = self._place_settings(rows, batch)
        asked = Asked(_bucket_top([one.logprobs for one in several], vocabulary), return_routing)
        of_prompt = Asked(_bucket_top([one.prompt_logprobs for one in several], vocabulary), return_routing)
        in_prompt = self._find_in_prompts(rows, batch) if any(one.has_penalties for one in several) else None
        cache = create_cache(model.config, batch, capacity, model.mesh, **dataclasses.asdict(self.cache))
        prompts = [row.prompt for row in rows] + [[0]] * (batch - len(rows))  # rows that fill the batch up hold one token, and make none
        logits, cache, details = prefill(model, of_prompt, variables, prompts, cache, width)
        for place, row in enumerate(rows):
            row.add_prompt(details, place)
        if all(row.ended for row in rows):
            return
        chosen, alive, counts, scores = choose_first(model.mesh, asked.num_top, logits, sampling, limits, in_prompt)
        del logits, details
        yield np.asarray(chosen), jax.device_get(Details(scores))
        state = DecodeState(cache, chosen, np.ones(batch, np.int32), alive, counts)  # pyright: ignore[reportArgumentType]
        steps, seconds = 1, 0.0
        while not all(row.ended for row in rows):
            open_rows = np.array([place < len(rows) and not rows[place].ended for place in range(batch)])
            state = dataclasses.replace(state, alive=open_rows)  # pyright: ignore[reportArgumentType]
            started = time.perf_counter()
            state, made, details = decode(model, asked, variables, state, sampling, limits, in_prompt, np.int32(steps))  # pyright: ignore[reportArgumentType]
            made, details = jax.device_get((made, details))
            count = int(np.sum(np.any(made >= 0, axis=1)))
            seconds = (time.perf_counter() - started) / max(count, 1)
            steps = int(np.clip(_SECONDS_A_CALL / seconds, 1, STEPS))
            for step in range(count):
                yield made[step], jax.tree.map(lambda leaf, step=step: leaf[step], details)

    def shapes(self, prompt_lengths: Sequence[int], new_tokens: Sequence[int]) -> tuple[int, int, int]:
        """(rows, prompt positions a call, cache capacity) that a batch is rounded up to: what its programs are compiled for."""
        longest = max(prompt_lengths)
        short = max(SHORTEST, 1 << (longest - 1).bit_length())
        width = short if short < self.bucket <= BUCKET else min(round_up(longest, self.bucket), self.chunk)
        capacity = 0  # of a cache that forgets, whose own sizes count
        if self.cache.kind == "full":
            capacity = round_up(max(length + new for length, new in zip(prompt_lengths, new_tokens, strict=True)), self.bucket)
        return 1 << (len(prompt_lengths) - 1).bit_length(), width, capacity

    def _place_settings(self, rows: list[Row], batch: int) -> tuple[Sampling, Limits]:
        """The settings as arrays of `batch` rows; those that fill up are greedy and make nothing."""
        fill = batch - len(rows)
        several = [row.settings for row in rows] + [GenerationSettings(max_new_tokens=0)] * fill
        stops = [row.stop_ids for row in rows] + [()] * fill

        def column(name: str, dtype: Any = np.float32) -> Any:
            return np.array([getattr(one, name) for one in several], dtype)

        widest = max(len(one.logit_bias) for one in several)
        bias_room = max(8, 1 << (widest - 1).bit_length()) if widest else 0
        bias_ids = np.full((batch, bias_room), self.model.config.vocab_size, np.int32)
        bias_values = np.zeros((batch, bias_room), np.float32)
        stop_ids = np.full((batch, round_up(max(map(len, stops)) or 1, 8)), -1, np.int32)
        for place, one in enumerate(several):
            bias_ids[place, : len(one.logit_bias)] = list(one.logit_bias)
            bias_values[place, : len(one.logit_bias)] = list(one.logit_bias.values())
            stop_ids[place, : len(stops[place])] = stops[place]
        arrays: dict[str, Any] = {
            name: column(name) for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        }
        # A top_k that int32 does not hold keeps all tokens, as one of the vocabulary's size does.
        arrays["top_k"] = np.array([min(one.top_k, self.model.config.vocab_size) for one in several], np.int32)
        arrays["seed"] = np.array([one.seed % 2**32 for one in several], np.uint32)
        sampling = Sampling(**arrays, bias_ids=bias_ids, bias_values=bias_values)  # pyright: ignore[reportArgumentType]
        return sampling, Limits(stop_ids, column("max_new_tokens", np.int32))  # pyright: ignore[reportArgumentType]

    def _find_in_prompts(self, rows: list[Row], batch: int) -> Any:
        found = np.zeros((batch, self.model.config.vocab_size), bool)
        for place, row in enumerate(rows):
            found[place, row.prompt] = True
        return found

    def _check(self, prompts: Sequence[Sequence[int]], several: Sequence[GenerationSettings]) -> None:
        config = self.model.config
        for row, (prompt, settings) in enumerate(zip(prompts, several, strict=True)):
            if not len(prompt):
                raise UserError(f"prompt {row} has no tokens; give at least one, such as the beginning-of-text id {config.bos_token_id}")
            outside = [token for token in prompt if not 0 <= token < config.vocab_size]
            if outside:
                raise UserError(f"prompt {row} holds token {outside[0]}, outside the model's vocabulary of {config.vocab_size}")
            for name, ids in (("logit_bias", settings.logit_bias), ("stop_token_ids", settings.stop_token_ids)):
                if beyond := [id for id in ids if id >= config.vocab_size]:
                    raise UserError(f"prompt {row}: {name} names token {beyond[0]}, outside the model's vocabulary of {config.vocab_size}")
            if settings.stop and self.tokenizer is None:
                raise UserError(
                    f"prompt {row}: stop={settings.stop!r} is text, but there is no tokenizer; give stop_token_ids, or pass one"
                )
            if self.cache.kind == "full" and len(prompt) + settings.max_new_tokens > config.max_length:
                warnings.warn(
                    f"prompt {row}: {len(prompt)} tokens and {settings.max_new_tokens} new ones go past the {config.max_length} "
                    "positions this model is meant for; expect the text to degrade there",
                    stacklevel=4,
                )


def spread_settings(settings: GenerationSettings | Sequence[GenerationSettings], rows: int) -> list[GenerationSettings]:
    """One per row: one for all is given to row i with seed + i. Raises UserError where the number is not that of the rows."""
    if isinstance(settings, GenerationSettings):
        return [dataclasses.replace(settings, seed=settings.seed + row) for row in range(rows)]
    if len(settings) != rows:
        raise UserError(f"settings for {len(settings)} prompts were given, but there are {rows}; give one for all, or one per prompt")
    return list(settings)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`; above eight of them in steps of a fourth to an eighth of the number,
    so that long texts do not need a program for every few tokens."""
    while number > 8 * multiple:
        multiple *= 2
    return -(-number // multiple) * multiple


@functools.partial(jax.jit, static_argnums=0)
def _prepare_for_cpu(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    params = unstack_layers(params, config) if config.scan_layers else params
    return turn_kernels(params) if choose_dispatch(config, None, ()) == "sorted" else params


def _bucket_top(wanted: list[int | None], vocabulary: int) -> int | None:
    """How many most likely tokens the device reports: None where no row asks, else a power of two from 8 on."""
    asked = [count for count in wanted if count is not None]
    return min(1 << max(3, (max(asked) - 1).bit_length()), vocabulary) if asked else None
