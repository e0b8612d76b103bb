"""Passkey retrieval: whether a model finds a number that stands at some depth of a text of some length.

    python -m moejax.evals passkey --checkpoint runs/passkey --lengths 256 512 1024 --scalings none yarn:4 --figure passkey.svg

The task of Mohtashami & Jaggi, "Random-Access Infinite Context Length for Transformers" (2023, arXiv 2305.16300), in the words of
`moejax.data.passkey`: a prompt of at most L tokens, BOS and answer included, with as many sentences of filler as fit; the share `depth` of
them before the key; the question at the end. Right is a prompt after which greedy decoding gives the key and the full stop, token by
token. That is asked in one pass: if every token of the answer is the likeliest behind those before it, greedy decoding finds each of them.
Keys have five different digits: one of 30,240 guesses is right.
"""

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from moejax.config import UserError
from moejax.data.passkey import draw_key, write_answer, write_prompt
from moejax.evals.output import Output, load_model, report
from moejax.evals.passkey_figure import draw_passkey
from moejax.evals.scalings import OWN, original_length, parse_scaling, scale_model
from moejax.evals.texts import find_run, trained_length
from moejax.model.cache import Cache, create_cache
from moejax.model.prefill import prefill_in_chunks
from moejax.model.transformer import Transformer

# What a model answers: (prompts [B, T] padded on the right, their lengths [B], answers [B, A]) -> the likeliest token at each of the A
# places, behind the prompt and the tokens of the answer before it.
Reader = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Arguments(Output):
    """Hides numbers at several depths of texts of several lengths."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024)  # tokens of prompt and answer, at most
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the filler that stands before the key
    keys: int = 20  # prompts of each length and depth
    scalings: tuple[str, ...] = (OWN,)  # of rotary positions: checkpoint (as it is), none, or KIND:FACTOR, as yarn:4
    chunk: int = 512  # tokens of a prompt read at a time; any number gives the same
    batch_size: int = 16  # prompts read together
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("keys", "chunk", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths={self.lengths}; expected one length or more, each above 0")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"depths={self.depths}; expected one or more from 0 (the beginning) to 1 (the end)")
        if not self.scalings:
            raise UserError(f"scalings is empty; name one or more, as {OWN} none yarn:4")
        for text in self.scalings:
            parse_scaling(text)


@dataclass(frozen=True)
class Prompt:
    """One question: ids of the text up to the answer, of the answer, and the key it has."""

    tokens: list[int]
    answer: list[int]
    key: str


def run(arguments: Arguments) -> None:
    """Asks, reports and draws."""
    started = time.perf_counter()
    model, variables, tokenizer = load_model(arguments)
    trained = trained_length(model.config, find_run(str(arguments.checkpoint)))
    rows = []
    for scaling in arguments.scalings:
        scaled = scale_model(model, parse_scaling(scaling), trained)
        for length in sorted(arguments.lengths):
            reader = functools.partial(read_answers, scaled, variables, capacity=length, chunk=arguments.chunk)
            rows.append({"name": f"{scaling}, {length}", "scaling": scaling, **measure_length(reader, tokenizer, length, arguments)})
    result = {
        **{name: getattr(arguments, name) for name in ("keys", "depths", "seed", "chunk")},
        "trained_length": trained,
        "original_length": original_length(model.config, trained),
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    whole = report("passkey", result, arguments, ("accuracy", *map(_name_depth, arguments.depths), "prompt_tokens", "seconds"))
    if arguments.figure is not None:
        draw_passkey(whole, Path(arguments.figure))


def measure_length(reader: Reader, tokenizer: Any, length: int, arguments: Arguments) -> dict[str, Any]:
    """A row of results: the share of prompts answered rightly at one length, by depth and in all."""
    started, shares, sizes = time.perf_counter(), [], []
    for depth in arguments.depths:
        prompts = make_prompts(tokenizer, length, depth, arguments.keys, arguments.seed)
        shares.append(float(np.mean(ask(reader, prompts, arguments.batch_size))))
        sizes += [len(prompt.tokens) + len(prompt.answer) for prompt in prompts]
    return {
        "length": length,
        "accuracy": float(np.mean(shares)),
        "accuracy_by_depth": shares,
        **{_name_depth(depth): share for depth, share in zip(arguments.depths, shares, strict=True)},
        "prompt_tokens": float(np.mean(sizes)),
        "seconds": time.perf_counter() - started,
    }


def _name_depth(depth: float) -> str:
    return f"depth {depth:g}"


def make_prompts(tokenizer: Any, length: int, depth: float, count: int, seed: int) -> list[Prompt]:
    """Prompts of at most `length` tokens with their answers, each with a key of its own. Raises UserError where no prompt is so short.

    The same seed gives the same keys at every length and depth.
    """
    rng = random.Random(f"moejax passkey evaluation {seed}")
    return [make_prompt(tokenizer, draw_key(rng), length, depth) for _ in range(count)]


def make_prompt(tokenizer: Any, key: str, length: int, depth: float) -> Prompt:
    """The prompt of a key with as many sentences of filler as `length` tokens hold, and the ids that its answer continues it with."""

    def encode(sentences: int) -> list[int]:
        return tokenizer.encode(write_prompt(key, sentences, depth) + write_answer(key))

    whole = encode(0)
    if len(whole) > length:
        raise UserError(f"lengths has {length}, but instruction, key and question alone take {len(whole)} tokens; ask for longer ones")
    low, high = 0, length  # a sentence has a token at least
    while low < high:
        middle = (low + high + 1) // 2
        longer = encode(middle)
        low, high, whole = (middle, high, longer) if len(longer) <= length else (low, middle - 1, whole)
    tokens = tokenizer.encode(write_prompt(key, low, depth))
    if whole[: len(tokens)] != tokens:
        raise UserError("the tokenizer cuts the end of the question otherwise where an answer follows; passkey needs one that does not")
    return Prompt(tokens, whole[len(tokens) :], key)


def ask(reader: Reader, prompts: Sequence[Prompt], batch_size: int) -> np.ndarray:
    """Whether each prompt is answered rightly, bool [prompts]. The last batch is filled up, so that all have one shape."""
    width = max(len(prompt.answer) for prompt in prompts)
    right = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        filled = [*some, *[some[-1]] * (batch_size - len(some))]
        lengths = np.array([len(prompt.tokens) for prompt in filled], np.int32)
        tokens = np.array([prompt.tokens + [0] * (lengths.max() - len(prompt.tokens)) for prompt in filled], np.int32)
        answers = np.array([prompt.answer + [0] * (width - len(prompt.answer)) for prompt in filled], np.int32)
        counted = np.array([[place < len(prompt.answer) for place in range(width)] for prompt in filled])
        likeliest = reader(tokens, lengths, answers)
        right.append(np.all((likeliest == answers) | ~counted, axis=1)[: len(some)])
    return np.concatenate(right)


def read_answers(
    model: Transformer, variables: Any, tokens: np.ndarray, lengths: np.ndarray, answers: np.ndarray, capacity: int, chunk: int
) -> np.ndarray:
    """A `Reader` of a model: prompts are read in chunks into a cache of `capacity` tokens a row, answers in one pass behind them.

    Dynamic scaling goes by the capacity: every prompt of a length is read with the same frequencies.
    """
    cache = create_cache(model.config, len(tokens), capacity, model.mesh)
    logits, cache = prefill_in_chunks(model, variables, tokens, lengths, cache, min(chunk, capacity))
    first = np.asarray(jnp.argmax(logits, axis=-1))
    return np.concatenate([first[:, None], np.asarray(_read_on(model, variables, answers[:, :-1], cache))], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _read_on(model: Transformer, variables: Any, tokens: Array, cache: Cache) -> Array:
    """The likeliest token behind each of `tokens` [B, T], which follow what the cache holds."""
    logits = model.apply(variables, tokens, cache=cache).logits
    assert logits is not None
    return jnp.argmax(logits, axis=-1)
