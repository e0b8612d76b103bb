"""The picture of a run's curriculum: what is mixed, and what the model makes of each domain's held-out text, over the tokens read."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.config import RunConfig
from moejax.data.curriculum import Schedule, normalise_weights
from moejax.files import write_file

# Okabe and Ito's colours, which those who see red and green alike can tell apart; black and yellow, poor as areas, come last.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP"  # lines differ by more than their colour
_UNITS = ((1e12, "trillion tokens"), (1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1, "tokens"))

Curves = dict[str, list[tuple[int, float]]]


def read_evaluations(run_directory: str | os.PathLike[str]) -> Curves:
    """(tokens, bits per byte) of each domain's evaluations in metrics.jsonl, by tokens; empty where there are none."""
    curves: dict[str, dict[int, float]] = {}
    path = Path(run_directory, "metrics.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(row, dict) and "eval_bits_per_byte" in row:
            curves.setdefault(row["domain"], {})[row["tokens"]] = row["eval_bits_per_byte"]
    return {domain: sorted(points.items()) for domain, points in curves.items()}


def draw_curriculum(
    run_directory: str | os.PathLike[str], config: RunConfig, path: str | os.PathLike[str], log: Callable[[str], None] = print
) -> None:
    """Writes the picture as a PNG: mixture above, held-out bits per byte below, both over tokens, the stages' boundaries marked.

    Whole or not at all. Without matplotlib a line is logged instead. Raises OSError where the file cannot be written.
    """
    # The first import on a machine reads all its fonts, and would tell of it on stderr.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log(f"no {Path(path).name}: matplotlib is not installed; pip install matplotlib")
        return
    total = config.steps * config.tokens_per_step
    scale, unit = next((scale, unit) for scale, unit in _UNITS if total >= scale)
    figure = Figure(figsize=(8, 6), layout="constrained")  # no pyplot: it has state, and might look for a screen
    mixture, losses = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    figure.suptitle(f"Curriculum of {config.name}: {config.steps:,} steps, {total / scale:.4g} {unit}")
    boundaries = _draw_mixture(mixture, config, total, scale)
    _draw_losses(losses, config, read_evaluations(run_directory), scale)
    for axes in (mixture, losses):
        for boundary in boundaries:
            axes.axvline(boundary / scale, color="0.25", linestyle="--", linewidth=1)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    losses.set_xlabel(f"{unit} read")
    losses.set_xlim(0, total / scale)
    _save(figure, Path(path))


def _draw_mixture(axes: Any, config: RunConfig, total: int, scale: float) -> list[int]:
    """Shares of the domains as areas; returns the tokens at which stages after the first begin."""
    data = config.data
    starts = [row * data.sequence_length for row in Schedule(data).stage_starts]
    reached = [(number, start) for number, start in enumerate(starts) if start < total]
    names = [domain.name for domain in data.sources]
    edges = [start / scale for _, start in reached] + [total / scale]
    bottom = [0.0] * len(reached)
    for place, name in enumerate(names):
        shares = [float(normalise_weights(data.curriculum[number].weights).get(name, 0)) * 100 for number, _ in reached]
        top = [low + share for low, share in zip(bottom, shares, strict=True)]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=_colour(place), label=name, edgecolor="white", linewidth=0.6)
        bottom = top
    for (number, start), stop in zip(reached, [*(start for _, start in reached[1:]), total], strict=True):
        middle = (start + stop) / 2 / scale
        axes.annotate(f"stage {number + 1}", (middle, 100), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_ylim(0, 100)
    axes.set_ylabel("share of tokens [%]")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True, title="domain")
    return [start for _, start in reached[1:]]


def _draw_losses(axes: Any, config: RunConfig, curves: Curves, scale: float) -> None:
    names = [domain.name for domain in config.data.sources]
    for place, name in enumerate(names):
        if name in curves:
            tokens, values = zip(*curves[name], strict=True)
            style = {"color": _colour(place), "marker": MARKERS[place % len(MARKERS)], "markersize": 4, "linewidth": 1.5}
            # Not clipped: the last point lies on the edge.
            axes.plot([count / scale for count in tokens], values, label=f"{name}: {values[-1]:.2f}", clip_on=False, **style)
    axes.set_ylabel("held-out text [bits per byte]")
    axes.grid(axis="y", color="0.9")
    if any(name in curves for name in names):
        axes.set_ylim(bottom=0)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="latest")
    else:
        axes.text(0.5, 0.5, "not evaluated yet", transform=axes.transAxes, ha="center", color="0.4")


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())
