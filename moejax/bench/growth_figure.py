"""The figure of the `growth` benchmark: one panel an axis, drawn from the rows of its JSON."""

from pathlib import Path
from typing import Any

from moejax.figures import BLUE, ORANGE, new_figure, save_figure

TITLES = {
    "experts": ("one MoE layer, active parameters fixed", "experts", "milliseconds"),
    "sequence": ("training step, one row", "tokens in the row", "microseconds a token"),
    "batch": ("training step, rows of one length", "rows", "microseconds a token"),
    "layers": ("training step by depth", "layers", "seconds"),
}


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the figure as .svg or .png, whole or not at all. Raises UserError where it cannot be written."""
    axes_shown = [axis for axis in TITLES if any(row["axis"] == axis for row in rows)]
    figure = new_figure(4.6 * min(len(axes_shown), 2), 3.4 * -(-len(axes_shown) // 2))
    panels = list(figure.subplots(-(-len(axes_shown) // 2), min(len(axes_shown), 2), squeeze=False).flat)
    for axis, panel in zip(axes_shown, panels, strict=False):
        _draw_panel(panel, axis, [row for row in rows if row["axis"] == axis])
    for panel in panels[len(axes_shown) :]:
        panel.remove()
    save_figure(figure, path)


def _draw_panel(panel: Any, axis: str, rows: list[dict[str, Any]]) -> None:
    title, along, unit = TITLES[axis]
    style = {"marker": "o", "markersize": 4, "linewidth": 1.5}
    values = sorted({row["value"] for row in rows})
    if axis == "experts":
        for name, colour in (("forward", BLUE), ("forward and backward", ORANGE)):
            some = [row for row in rows if row["pass"] == name]
            _plot(panel, some, [row["seconds"] * 1e3 for row in some], name, colour, style)
    elif axis == "layers":
        _plot(panel, rows, [row["compile_seconds"] for row in rows], "compiling", ORANGE, style)
        _plot(panel, rows, [row["seconds"] for row in rows], "one step", BLUE, style)
    else:
        _plot(panel, rows, [row["seconds"] / row["tokens"] * 1e6 for row in rows], None, BLUE, style)
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:,}" for value in values])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set(title=title, xlabel=along, ylabel=unit)
    panel.grid(axis="y", color="0.9")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    if axis in ("experts", "layers"):
        panel.legend(frameon=False)


def _plot(panel: Any, rows: list[dict[str, Any]], heights: list[float], label: str | None, colour: str, style: dict[str, Any]) -> None:
    panel.plot([row["value"] for row in rows], heights, label=label, color=colour, clip_on=False, **style)
