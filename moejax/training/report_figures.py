"""The figures of a run's report. Each function takes a RunRecord and returns a figure, or None where the run has nothing to show in it."""

import base64
import io
import itertools
import math
from contextlib import AbstractContextManager
from typing import Any

from moejax.training.report_data import RunRecord, describe_count, select, select_layers
from moejax.training.starts import count_kept_steps, split_steps

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, GREY = "#2563a8", "#d9822b", "#3a8a5f", "#b8433a", "#7a5aa6", "#2a8f9c", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, "#a6761d", "#666f7a", "#c2569b", "#1f3d63")
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#3c434d", "text.color": "#1f2630", "xtick.color": "#3c434d", "ytick.color": "#3c434d", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 9, "svg.fonttype": "path", "svg.hashsalt": "moejax",
}  # fmt: skip
WIDE, HALF = (10.4, 3.2), (5.2, 4.2)  # inches: across the page, and one of a pair

# What time goes to, as starts.jsonl and the rows of metrics.jsonl call it, what people call it, and its colour.
PARTS = (
    ("step", "steps", BLUE),
    ("redone", "steps done again later", RED),
    ("data", "waiting for data", ORANGE),
    ("compile", "compiling", PURPLE),
    ("save", "saving", GREEN),
    ("evaluation", "evaluating", TEAL),
    ("trace", "tracing", "#a6761d"),
    ("startup", "starting up", GREY),
)


def drawing_style() -> AbstractContextManager[Any]:
    """matplotlib's settings while a figure of the report is drawn and encoded."""
    import matplotlib
    from cycler import cycler

    settings: Any = {**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}
    return matplotlib.rc_context(settings)


def encode(figure: Any) -> str:
    """The figure as the address of an <img>: an SVG that needs nothing else."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _subplots(rows: int, size: tuple[float, float], heights: tuple[float, ...] | None = None) -> tuple[Any, list[Any]]:
    """A figure with `rows` panels above each other on one axis of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels[-1].set_xlabel("tokens")
    panels[-1].xaxis.set_major_formatter(lambda value, _: describe_count(value))
    panels[-1].xaxis.set_major_locator(_locator(7 if size[0] > 6 else 5))
    return figure, list(panels)


def _locator(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _plot(panel: Any, tokens: list[float], values: list[float], **style: Any) -> None:
    """A line; a single point is shown as one."""
    panel.plot(tokens, values, marker="o" if len(tokens) < 3 else None, markersize=4, **style)


def smooth(values: list[float], reach: int) -> list[float]:
    """The mean of each value and of up to `reach` values on both sides of it, as many on one as on the other: no lag."""
    totals, result = [0.0, *itertools.accumulate(values)], []
    for index in range(len(values)):
        side = min(reach, index, len(values) - 1 - index)
        result.append((totals[index + side + 1] - totals[index - side]) / (2 * side + 1))
    return result


def draw_loss(record: RunRecord) -> Any:
    """Training loss, and the learning rate below it."""
    tokens, losses = select(record.rows, "loss")
    rate_tokens, rates = select(record.rows, "learning_rate")
    if not tokens:
        return None
    figure, panels = _subplots(2 if rates else 1, (WIDE[0], 4.2 if rates else 3.2), (3, 1) if rates else None)
    many = len(tokens) >= 40
    _plot(panels[0], tokens, losses, color=BLUE, alpha=0.35 if many else 1, linewidth=1, label="each row" if many else None)
    if many:
        panels[0].plot(tokens, smooth(losses, len(losses) // 40), color=BLUE, label="smoothed")
        panels[0].legend(loc="upper right")
    panels[0].set_ylabel("loss, nats a token")
    if rates:
        _plot(panels[1], rate_tokens, rates, color=GREY)
        panels[1].set_ylabel("learning rate")
        panels[1].set_ylim(bottom=0)
        panels[1].ticklabel_format(axis="y", scilimits=(-2, 3))
    return figure


def draw_evaluation(record: RunRecord) -> Any:
    """Bits per byte of each domain's held-out text."""
    if not any(isinstance(row.get("eval_bits_per_byte"), int | float) for row in record.evaluations):
        return None
    figure, (panel,) = _subplots(1, WIDE)
    for domain in record.domains:
        tokens, values = select([row for row in record.evaluations if row["domain"] == domain], "eval_bits_per_byte")
        panel.plot(tokens, values, marker="o", markersize=3.5, label=f"{domain}  {values[-1]:.3f}" if values else domain)
    panel.set_ylabel("bits per byte")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="held-out text, last value")
    return figure


def draw_router(record: RunRecord) -> Any:
    """Balance of the experts' load: each layer's fullest expert, and entropy."""
    loads_tokens, loads = select_layers(record.rows, "expert_load_max_over_mean")
    layers_tokens, layers = select_layers(record.rows, "expert_load_entropy_per_layer")
    mean_tokens, means = select(record.rows, "expert_load_entropy")
    if not loads and not layers and not means:
        return None
    figure, panels = _subplots(2 if loads else 1, HALF if loads else (HALF[0], 3.2))
    if loads:
        _draw_layers(panels[0], loads_tokens, loads)
        panels[0].axhline(1, color=GREY, linestyle=":", linewidth=1)
        panels[0].set_ylabel("fullest expert / mean")
    if layers:
        _draw_layers(panels[-1], layers_tokens, layers)
    else:
        _plot(panels[-1], mean_tokens, means, color=BLUE, label="mean of the layers")
    panels[-1].set_ylabel("entropy / log E")
    panels[-1].axhline(1, color=GREY, linestyle=":", linewidth=1)
    panels[0].legend(loc="best")
    return figure


def _draw_layers(panel: Any, tokens: list[float], values: list[list[float]]) -> None:
    """One line a layer up to four of them; of more, the mean and the range."""
    if len(values[0]) <= 4:
        for layer in range(len(values[0])):
            _plot(panel, tokens, [row[layer] for row in values], label=f"MoE layer {layer}", linewidth=1.2)
        return
    lowest, highest = [min(row) for row in values], [max(row) for row in values]
    panel.fill_between(tokens, lowest, highest, color=BLUE, alpha=0.18, linewidth=0, label=f"range of {len(values[0])} layers")
    _plot(panel, tokens, [sum(row) / len(row) for row in values], color=BLUE, label="mean")


def draw_router_map(record: RunRecord) -> Any:
    """The fullest expert's load over the mean, layer by layer, as a map."""
    tokens, loads = select_layers(record.rows, "expert_load_max_over_mean", 200)
    if len(loads) < 2:
        return None
    figure, (panel,) = _subplots(1, HALF)
    edges = [*tokens, 2 * tokens[-1] - tokens[-2]]
    layers = [[row[layer] for row in loads] for layer in range(len(loads[0]))]
    mesh = panel.pcolormesh(edges, range(len(layers) + 1), layers, cmap="YlOrRd", vmin=1, rasterized=True)
    figure.colorbar(mesh, ax=panel, label="fullest expert / mean", pad=0.02)
    panel.set_ylabel("MoE layer")
    stride = -(-len(layers) // 12)
    panel.set_yticks([layer + 0.5 for layer in range(0, len(layers), stride)], [str(layer) for layer in range(0, len(layers), stride)])
    panel.invert_yaxis()
    panel.grid(False)
    return figure


def draw_gradients(record: RunRecord) -> Any:
    """Norm of the gradient before clipping; where steps were skipped is marked."""
    tokens, norms = select(record.rows, "grad_norm")
    skipped = find_skips(record)
    if not tokens and not skipped:
        return None
    figure, (panel,) = _subplots(1, HALF)
    _plot(panel, tokens, norms, color=BLUE, linewidth=1, label="gradient norm")
    if tokens and min(norms) > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: describe_count(value))
        panel.yaxis.set_minor_formatter(lambda value, _: describe_count(value) if f"{value:e}"[0] in "25" else "")
    clip = record.section("train").get("clip_norm")
    if isinstance(clip, int | float):
        panel.axhline(clip, color=GREY, linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
    for index, (at, _) in enumerate(skipped):
        panel.axvline(at, color=RED, alpha=0.7, linewidth=1.2, label="steps skipped" if index == 0 else None)
    panel.set_ylabel("gradient norm")
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return figure


def find_skips(record: RunRecord) -> list[tuple[float, int]]:
    """(tokens, steps skipped since the row before) of the rows since whose predecessor steps were skipped."""
    tokens, totals = select(record.rows, "skipped_steps", len(record.rows) or 1)
    new = [now - before for before, now in zip([0, *totals], totals, strict=False)]
    return [(at, int(count)) for at, count in zip(tokens, new, strict=True) if count > 0]


def draw_time(record: RunRecord) -> Any:
    """Shares of the time between two rows."""
    names = {"data": "data_wait_fraction", "save": "save_fraction", "evaluation": "evaluation_fraction", "compile": "compile_fraction"}
    rows = [row for row in record.rows if "data_wait_fraction" in row]
    if len(rows) < 2:
        return None
    rows = rows[:: -(-len(rows) // 400)]
    shares = {part: [100 * (row.get(name) or 0.0) for row in rows] for part, name in names.items()}
    shares["trace"] = [100 * (row.get("trace_fraction") or 0.0) for row in rows]
    shares["step"] = [max(100 - sum(values), 0.0) for values in zip(*shares.values(), strict=True)]
    figure, (panel,) = _subplots(1, HALF)
    shown = [(words, shares[part], colour) for part, words, colour in PARTS if any(shares.get(part, ()))]
    tokens = [float(row.get("tokens", row["step"])) for row in rows]
    panel.stackplot(
        tokens, [s for _, s, _ in shown], labels=[w for w, _, _ in shown], colors=[c for _, _, c in shown], step="pre", alpha=0.9
    )
    panel.set_ylim(0, 100)
    panel.set_xlim(tokens[0], tokens[-1])
    panel.set_ylabel("% of the time")
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return figure


def draw_speed(record: RunRecord) -> Any:
    """Tokens a second, and model FLOPs utilisation."""
    tokens, rates = select(record.rows, "tokens_per_second")
    mfu_tokens, shares = select(record.rows, "mfu")
    if not tokens:
        return None
    figure, panels = _subplots(2 if shares else 1, HALF if shares else (HALF[0], 3.2))
    _plot(panels[0], tokens, rates, color=BLUE, linewidth=1.2)
    panels[0].set_ylabel("tokens/s")
    panels[0].set_ylim(bottom=0)
    panels[0].yaxis.set_major_formatter(lambda value, _: describe_count(value))
    if shares:
        _plot(panels[1], mfu_tokens, [100 * share for share in shares], color=ORANGE, linewidth=1.2)
        panels[1].set_ylabel("MFU, %")
        panels[1].set_ylim(bottom=0)
    return figure


def draw_memory(record: RunRecord) -> Any:
    """The most memory in use so far, start by start, and goodput."""
    tokens, peaks = select(record.rows, "peak_memory_bytes")
    good_tokens, goods = select(record.rows, "goodput")
    if not tokens and not goods:
        return None
    figure, panels = _subplots(2 if tokens and goods else 1, HALF)
    if tokens:
        _plot(panels[0], tokens, [peak / 1e9 for peak in peaks], color=PURPLE)
        panels[0].set_ylabel("peak memory, GB")
        panels[0].set_ylim(bottom=0)
    if goods:
        _plot(panels[-1], good_tokens, [100 * good for good in goods], color=GREEN)
        panels[-1].set_ylabel("goodput, %")
        panels[-1].set_ylim(0, 100)
    return figure


def draw_starts(record: RunRecord) -> Any:
    """One bar a start: what its time went to. At most the last 30."""
    from matplotlib.figure import Figure

    numbered = zip(record.starts, count_kept_steps(record.starts), strict=True)
    bars = [(str(number), _spend(start, kept)) for number, (start, kept) in enumerate(numbered, 1)][-30:]
    longest = max((sum(bar.values()) for _, bar in bars), default=0.0)
    if longest <= 0:
        return None
    size, unit = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 180 else (1, "seconds")
    figure = Figure(figsize=(WIDE[0], 1.2 + 0.32 * len(bars)), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(bars)
    for part, words, colour in PARTS:
        values = [bar[part] / size for _, bar in bars]
        if any(values):
            panel.barh([number for number, _ in bars], values, left=left, color=colour, label=words, height=0.62)
            left = [sum(both) for both in zip(left, values, strict=True)]
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(unit)
    panel.set_ylabel("start")
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=8, borderaxespad=0.2, columnspacing=1.2, handlelength=1.4)
    return figure


def _spend(start: dict[str, Any], kept: int) -> dict[str, float]:
    """Seconds of a start by PARTS."""
    seconds = {part: start.get(f"{part}_seconds", 0.0) for part, _, _ in PARTS}
    seconds["step"], seconds["redone"] = split_steps(start, kept)
    return seconds


def is_finite(value: Any) -> bool:
    """Whether a value of a row is a number one can write down."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
