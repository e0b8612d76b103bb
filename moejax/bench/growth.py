"""How cost grows: experts at fixed active parameters, length of a row, rows of a batch, layers; a table, JSON and a figure.

    python -m moejax.bench growth --json growth.json --figure growth.svg
    python -m moejax.bench growth --axes layers --join growth.json ...       one axis again, the others' rows from an earlier result

experts times one MoE layer (router, rows to experts, their MLPs, back) on `rows` tokens, F and A fixed; the other axes time a training
step of a small model. All sizes of an axis are timed in turns, with the machine's ceilings.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moejax.bench.measure import Ceilings, describe_rates, describe_shape, time_calls
from moejax.bench.output import Output, read_result, report
from moejax.bench.shape import LAYER_FIELDS, PEER_SHAPE, SHAPE_FIELDS
from moejax.config import ModelConfig, UserError
from moejax.figures import check_figure

AXES = ("experts", "sequence", "batch", "layers")
COLUMNS = (
    "seconds", "seconds_lowest", "seconds_highest", "seconds_over_first", "tokens_per_second", "flops_per_second", "fraction_of_ceiling",
    "compile_seconds", "temporary_bytes",
)  # fmt: skip
SMALL = replace(
    PEER_SHAPE, vocab_size=1024, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_size=64,
    max_length=8192, scan_layers=True,
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Output):
    """Times one layer or one training step over the sizes of each axis."""

    axes: tuple[str, ...] = AXES
    experts: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    sequence: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # one row of it a step
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # rows of row_length tokens
    layers: tuple[int, ...] = (2, 4, 8, 16, 32)  # of a step on one row of row_length tokens
    layer: ModelConfig = field(default_factory=lambda: PEER_SHAPE)  # whose MoE layer axis experts times
    rows: int = 8192  # tokens of one call of that layer
    model: ModelConfig = field(default_factory=lambda: SMALL)  # that the other axes train
    row_length: int = 128
    repeats: int = 5
    join: tuple[str, ...] = ()  # JSON of earlier runs, whose rows of axes that are not measured now are put beside the new ones
    figure: str | None = None  # a file for the figure, .svg or .png

    def __post_init__(self) -> None:
        for axis in self.axes:
            if axis not in AXES:
                raise UserError(f"axes has {axis!r}; expected some of {', '.join(AXES)}")
            sizes = getattr(self, axis)
            if not sizes or min(sizes) < 1:
                raise UserError(f"{axis}={sizes}; expected one size or more, each above 0")
        if not self.axes and not self.join:
            raise UserError(f"axes is empty, and so is join; name some of {', '.join(AXES)}")
        check_figure(self.figure)


def run(arguments: Arguments) -> None:
    """Measures, reports and draws."""
    rows = []
    for file in arguments.join:
        rows += [row for row in read_result("growth", file, "--join").get("rows", []) if row.get("axis") not in arguments.axes]
    for axis in arguments.axes:
        rows += measure_experts(arguments) if axis == "experts" else measure_steps(axis, arguments)
    rows.sort(key=lambda row: AXES.index(row["axis"]))
    result = {
        "experts_rows": arguments.rows,
        "row_length": arguments.row_length,
        "layer": describe_shape(arguments.layer, tuple(name for name in LAYER_FIELDS if name != "num_experts")),
        "model": describe_shape(arguments.model, SHAPE_FIELDS),
        "rows": rows,
    }
    report("growth", result, arguments, COLUMNS)
    if arguments.figure is not None:
        from moejax.bench.growth_figure import draw_growth

        draw_growth(rows, Path(arguments.figure))


def measure_experts(arguments: Arguments) -> list[dict[str, Any]]:
    """One MoE layer over its number of experts, forward and with gradients."""
    from moejax.bench.moe import PASSES, compile_layer, describe_layer

    ceilings = Ceilings(arguments.layer.dtype)
    rows = []
    for number, kind in enumerate(PASSES):
        layers = {
            experts: compile_layer(replace(arguments.layer, num_experts=experts), None, arguments.rows, number == 1)
            for experts in arguments.experts
        }
        functions = {str(experts): layer.run for experts, layer in layers.items()}
        timings = time_calls({**functions, **ceilings.functions}, arguments.repeats)
        reached = ceilings.results(timings)
        first = timings[str(arguments.experts[0])].median
        for experts, layer in layers.items():
            timing = timings[str(experts)]
            place = {"name": f"experts {experts}, {kind}", "axis": "experts", "value": experts, "pass": kind}
            ratio = timing.median / first
            rows.append({**place, **describe_layer(layer, arguments.rows, timing, reached), "seconds_over_first": ratio})
    return rows


def measure_steps(axis: str, arguments: Arguments) -> list[dict[str, Any]]:
    """A training step over the sizes of one axis."""
    from moejax.bench.train import compile_step
    from moejax.families.flops import count_flops

    shapes = {}
    for value in getattr(arguments, axis):
        config = replace(arguments.model, max_length=max(arguments.model.max_length, arguments.row_length, value))
        rows, length = 1, arguments.row_length
        if axis == "layers":
            config = replace(config, num_layers=value)
        elif axis == "batch":
            rows = value
        else:
            length = value
        shapes[value] = (config, rows, length)
    if axis == "layers":  # whose compiling is compared: the first program of a process takes longer
        compile_step(*next(iter(shapes.values())))
    steps = {value: compile_step(*shape) for value, shape in shapes.items()}
    ceilings = Ceilings(arguments.model.dtype)
    timings = time_calls({**{str(value): step.run for value, step in steps.items()}, **ceilings.functions}, arguments.repeats)
    reached = ceilings.results(timings)
    first = next(iter(steps))
    described = []
    for value, (config, rows, length) in shapes.items():
        timing, flops = timings[str(value)], count_flops(config, rows, length)
        described.append(
            {
                "name": f"{axis} {value}",
                "axis": axis,
                "value": value,
                "tokens": rows * length,
                **describe_rates(timing, reached, rows * length, flops),
                "seconds_over_first": timing.median / timings[str(first)].median,
                "flops": flops,
                "compile_seconds": steps[value].compile_seconds,
                "compile_over_first": steps[value].compile_seconds / steps[first].compile_seconds,
                "temporary_bytes": steps[value].temporary_bytes,
            }
        )
    return described
