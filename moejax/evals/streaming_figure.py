"""The figure of the `streaming` evaluation: loss along the stream, how far it is above that of rows as trained, and what a block took."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.figures import BLACK, BLUE, GREEN, ORANGE, new_figure, save_figure

STYLES: dict[str, dict[str, Any]] = {
    "sinks": {"color": BLUE, "linewidth": 3.5, "alpha": 0.5},  # the others lie on it where they are equal
    "window": {"color": ORANGE, "linewidth": 1.5},
    "full": {"color": GREEN, "linewidth": 1.5},
    "rows": {"color": BLACK, "linewidth": 1.2, "linestyle": ":"},
}
SMOOTHED = 5  # blocks a point is the mean (of times: the median) of


def draw_streaming(result: dict[str, Any], path: Path) -> None:
    """Writes the figure as .svg or .png, whole or not at all. Raises UserError where it cannot be written."""
    rows = {row["name"]: row for row in result["rows"]}
    plain = rows.get("rows")
    figure = new_figure(4.6 * (2 + (plain is not None)), 3.4)
    losses, *between, seconds = figure.subplots(1, 2 + (plain is not None))
    for name, row in rows.items():
        style = STYLES[name] | {"label": label_of(name, result)}
        losses.plot(*_points(row["loss_by_block"], result["block"], np.mean), **style)
        if None not in row["seconds_by_block"]:
            seconds.plot(*_points([1e3 * value for value in row["seconds_by_block"]], result["block"], np.median), **style)
        for panel in between if name != "rows" else []:
            over = [one - other for one, other in zip(row["loss_by_block"], rows["rows"]["loss_by_block"], strict=False)]
            panel.plot(*_points(over, result["block"], np.mean, 1), **style)
    losses.set(title="loss along the stream", ylabel="nats a token")
    losses.legend(frameon=False)
    for panel in between:
        panel.set(title="the same, over that of rows as trained", ylabel="nats a token", xscale="log")
    seconds.set(title=f"time of {result['block']:,} tokens", ylabel="milliseconds")
    seconds.set_ylim(bottom=0)
    for panel in (losses, *between, seconds):
        panel.set_xlabel("thousand tokens read")
        panel.grid(axis="y", color="0.9")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    save_figure(figure, path)


def label_of(way: str, result: dict[str, Any]) -> str:
    """What a line is called."""
    sinks, window, trained = result["sinks"], result["window"], result["trained_length"]
    return {
        "sinks": f"{sinks} sinks + window {window}",
        "window": f"window {window + sinks}",
        "full": "all tokens kept",
        "rows": f"rows of {trained}, as trained",
    }[way]


def _points(values: list[float], block: int, middle: Callable[[list[float]], Any], size: int = SMOOTHED) -> tuple[list[float], list[float]]:
    """Thousands of tokens, and the middle of `size` blocks there; few blocks stay as they are."""
    size = size if len(values) >= 4 * size else 1
    parts = [values[start : start + size] for start in range(0, len(values) - size + 1, size)]
    return [(place + 0.5) * size * block / 1e3 for place in range(len(parts))], [float(middle(part)) for part in parts]
