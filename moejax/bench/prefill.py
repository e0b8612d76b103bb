"""Prefill: tokens/s of reading prompts into an empty cache up to the first new token, and FLOP/s against a large matmul."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from moejax.bench.counts import count_prefill_flops
from moejax.bench.decode import make_prompts
from moejax.bench.measure import Ceilings, describe_rates, describe_shape, peak_memory, time_calls
from moejax.bench.output import Output, report
from moejax.bench.shape import PEER_BATCH, PEER_PROMPT, PEER_SHAPE, SHAPE_FIELDS, hold_to_peer_shape
from moejax.config import ModelConfig, UserError

COLUMNS = (
    "tokens_per_second", "seconds", "seconds_lowest", "seconds_highest", "flops_per_second", "ceiling_flops_per_second",
    "fraction_of_ceiling", "compile_seconds",
)  # fmt: skip
SHAPES = (f"{PEER_BATCH[0]}x{PEER_BATCH[1]}", f"1x{PEER_PROMPT}", f"8x{PEER_PROMPT}", "1x1024")


@dataclass(frozen=True)
class Arguments(Output):
    """Times the reading of prompts."""

    model: ModelConfig = field(default_factory=lambda: PEER_SHAPE)
    prompts: tuple[str, ...] = SHAPES  # BATCHxLENGTH, as 8x256
    repeats: int = 7
    peer_shape: bool = False  # the default shape, said aloud: the model may be no other

    def __post_init__(self) -> None:
        self.shapes  # noqa: B018 - raises for what is no shape

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(batch, length) of each prompt."""
        shapes = []
        for text in self.prompts:
            batch, _, length = text.partition("x")
            if not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
                raise UserError(f"prompts has {text!r}; expected BATCHxLENGTH, as 8x256")
            shapes.append((int(batch), int(length)))
        if not shapes:
            raise UserError("prompts is empty; expected one BATCHxLENGTH or more, as 8x256")
        return shapes


def run(arguments: Arguments) -> None:
    """Measures and reports."""
    from moejax.model.transformer import Transformer, init_parameters

    arguments = hold_to_peer_shape(arguments)
    model = Transformer(arguments.model)
    variables = {"params": jax.jit(functools.partial(init_parameters, model))(jax.random.key(0))}
    functions, compiling = {}, {}
    for shape in arguments.shapes:
        functions[shape] = prefiller(model, variables, *shape)
        started = time.perf_counter()
        functions[shape]()
        compiling[shape] = time.perf_counter() - started
    memory = peak_memory()  # before the ceilings take theirs
    ceilings = Ceilings(arguments.model.dtype)
    rows = []
    for (batch, length), function in functions.items():
        timings = time_calls({"prefill": function, **ceilings.functions}, arguments.repeats)
        timing = timings["prefill"]
        flops = count_prefill_flops(arguments.model, batch, length)
        rows.append(
            {
                "name": f"{batch} x {length}",
                "batch_size": batch,
                "prompt_length": length,
                **describe_rates(timing, ceilings.results(timings), batch * length, flops),
                "flops": flops,
                "compile_seconds": compiling[batch, length] - timing.median,
            }
        )
    report("prefill", {**memory, **describe_shape(arguments.model, SHAPE_FIELDS), "rows": rows}, arguments, COLUMNS)


def prefiller(model: Any, variables: Any, batch: int, length: int) -> Callable[[], Any]:
    """A call that asks the engine for one new token a row, which is what comes out of a prefill."""
    from moejax.serving.engine import Engine, GenerationSettings

    engine, prompts = Engine(model, variables), make_prompts(model.config, batch, length).tolist()
    settings = GenerationSettings(1, ignore_eos=True)
    return lambda: engine.generate(prompts, settings)
