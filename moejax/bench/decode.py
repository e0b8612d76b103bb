"""Decoding: tokens/s and milliseconds a step by batch size, time to the first token, and bytes/s against the machine's bandwidth.

Greedy continuations of random prompts by freshly initialised weights, EOS ignored. A step must read the weights of attention, routers,
touched experts and head once, and the keys and values of all tokens so far: counted by hand, in moejax/bench/counts.py. The limit is
that many bytes at the bandwidth measured in the same turns.
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from moejax.bench.counts import count_decode_bytes, count_decode_flops
from moejax.bench.measure import Ceilings, describe_shape, describe_timing, peak_memory, summarise_seconds, time_calls
from moejax.bench.output import Output, report
from moejax.bench.shape import PEER_NEW, PEER_PROMPT, PEER_SHAPE, SHAPE_FIELDS, hold_to_peer_shape
from moejax.config import ModelConfig, UserError
from moejax.families.counts import expect_touched

COLUMNS = (
    "tokens_per_second", "step_milliseconds", "seconds_to_first_token", "overall_tokens_per_second", "bytes_per_step", "experts_touched",
    "bytes_per_second", "ceiling_bytes_per_second", "fraction_of_ceiling", "flops_per_second", "compile_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Output):
    """Times greedy decoding."""

    model: ModelConfig = field(default_factory=lambda: PEER_SHAPE)
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    prompt_length: int = PEER_PROMPT
    new_tokens: int = PEER_NEW
    repeats: int = 5
    peer_shape: bool = False  # the default shape, said aloud: no size but the batch may be another

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1 or self.prompt_length < 1:
            raise UserError(f"batch_sizes={self.batch_sizes} and prompt_length={self.prompt_length} must be above 0")
        if self.new_tokens < 2:
            raise UserError(f"new_tokens={self.new_tokens} must be at least 2: the first token comes with the prompt, steps after it")


@dataclass(frozen=True)
class Continuation:
    """One call: when its first token was there, and when its last."""

    first: float  # seconds after the call
    last: float
    tokens: np.ndarray  # [B, new]


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.model.transformer import Transformer, init_parameters
    from moejax.serving.engine import Engine

    arguments = hold_to_peer_shape(arguments, prompt_length=PEER_PROMPT, new_tokens=PEER_NEW)
    model = Transformer(arguments.model)
    variables = {"params": jax.jit(functools.partial(init_parameters, model))(jax.random.key(0))}
    engine = Engine(model, variables)
    first = {batch: continue_prompts(engine, batch, arguments) for batch in arguments.batch_sizes}
    memory = peak_memory()  # before the ceilings take theirs
    ceilings = Ceilings(arguments.model.dtype)
    rows = [measure_batch(engine, batch, first[batch], ceilings, arguments) for batch in arguments.batch_sizes]
    sizes = {"prompt_length": arguments.prompt_length, "new_tokens": arguments.new_tokens}
    report("decode", {**memory, **sizes, **describe_shape(arguments.model, SHAPE_FIELDS), "rows": rows}, arguments, COLUMNS)


def continue_prompts(engine: Any, batch: int, arguments: Arguments) -> Continuation:
    """Continues the same random prompts each time, as any caller of the engine does."""
    from moejax.generation_config import GenerationSettings

    settings = GenerationSettings(arguments.new_tokens, ignore_eos=True)
    prompts = make_prompts(arguments.model, batch, arguments.prompt_length).tolist()
    started, first, steps = time.perf_counter(), 0.0, []
    for tokens in engine.stream(prompts, settings):
        first = first or time.perf_counter() - started
        steps.append(tokens)
    return Continuation(first, time.perf_counter() - started, np.array(steps, np.int32).T)


def make_prompts(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    """Random tokens [B, length]; the same for the same sizes."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def measure_batch(engine: Any, batch: int, compiling: Continuation, ceilings: Ceilings, arguments: Arguments) -> dict[str, Any]:
    """A row of results: one batch size. `compiling` is the first call, which compiled."""
    config, new = arguments.model, arguments.new_tokens
    calls: list[Continuation] = []
    functions = {"decode": lambda: calls.append(continue_prompts(engine, batch, arguments)), **ceilings.functions}
    reached = ceilings.results(time_calls(functions, arguments.repeats, warmup=1))
    calls = calls[1:]
    step = summarise_seconds([(call.last - call.first) / (new - 1) for call in calls])
    whole = summarise_seconds([call.last for call in calls])
    prompts = make_prompts(config, batch, arguments.prompt_length)
    touched = count_touched(engine.model, engine.variables, np.concatenate([prompts, calls[-1].tokens], axis=1), arguments.prompt_length)
    seen = arguments.prompt_length + new / 2  # of the steps' tokens, each seeing itself and all before: prompt + 1 to prompt + new - 1
    parts = count_decode_bytes(config, batch, seen, touched)
    rate = sum(parts.values()) / step.median
    return {
        "name": f"batch {batch}",
        "batch_size": batch,
        "tokens_per_second": batch / step.median,
        "overall_tokens_per_second": batch * new / whole.median,
        "step_milliseconds": step.median * 1e3,
        "seconds_to_first_token": summarise_seconds([call.first for call in calls]).median,
        "seconds_whole_call": whole.median,
        **describe_timing(step),
        "flops_per_second": count_decode_flops(config, batch, seen) / step.median,
        "bytes_per_second": rate,
        **reached,
        "fraction_of_ceiling": rate / reached["ceiling_bytes_per_second"],
        "bound": "bytes",
        "limit_tokens_per_second": batch * reached["ceiling_bytes_per_second"] / sum(parts.values()),
        "bytes_per_step": sum(parts.values()),
        "bytes_per_step_by_part": parts,
        "experts_touched": touched,
        "experts_touched_uniform_routing": expect_touched(config, batch),
        "compile_seconds": compiling.last - whole.median,
    }


def count_touched(model: Any, variables: Any, tokens: np.ndarray, prompt_length: int) -> float:
    """Experts that a step's tokens met together, mean over the steps after `prompt_length` and the MoE layers: as routed, not assumed."""
    if not model.config.moe_layers:
        return 0.0
    routed = jax.jit(lambda variables, tokens: model.apply(variables, tokens, return_logits=False, return_routing=True).routing.experts)
    experts = np.asarray(routed(variables, tokens[:, :-1]))[:, :, prompt_length:]  # [layers, B, steps, A]
    chosen = np.any(experts[..., None] == np.arange(model.config.num_experts), axis=(1, 3))  # [layers, steps, E]
    return float(chosen.sum(-1).mean())
