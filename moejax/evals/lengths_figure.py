"""The figure of `lengths`: the loss of the same tokens by the length of what stands before them, and the loss by position."""

import itertools
from pathlib import Path
from typing import Any

from moejax.figures import COLOURS, MARKERS, new_figure, save_figure


def draw_lengths(result: dict[str, Any], path: Path) -> None:
    """Writes the figure of a result of `lengths` as .svg or .png. Raises UserError where it cannot be written."""
    rows = result["rows"]
    scalings = list(dict.fromkeys(row["scaling"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    figure = new_figure(9.4, 3.6)
    by_length, by_position = figure.subplots(1, 2)
    for place, scaling in enumerate(scalings):
        own = [row for row in rows if row["scaling"] == scaling]
        style = {"color": COLOURS[place % len(COLOURS)], "label": scaling, "linewidth": 1.5}
        marker = MARKERS[place % len(MARKERS)]
        by_length.plot([row["length"] for row in own], [row["nats_a_token"] for row in own], marker=marker, markersize=4, **style)
        longest = max(own, key=lambda row: row["length"])
        edges = [0.0, *longest["positions"]]
        middles = [(start + stop) / 2 for start, stop in itertools.pairwise(edges)]
        by_position.plot(middles, longest["nats_by_position"], **style)
    by_length.set_xscale("log", base=2)
    by_length.set_xticks(lengths, [f"{length:,}" for length in lengths])
    by_length.minorticks_off()
    by_length.set(title=f"last {result['scored']} tokens of each window", xlabel="tokens of the window", ylabel="nats a token")
    by_position.set(title=f"windows of {lengths[-1]:,} tokens", xlabel="position", ylabel="nats a token")
    for panel in (by_length, by_position):
        panel.axvline(result["original_length"], color="0.25", linestyle="--", linewidth=1)
        panel.grid(axis="y", color="0.9")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    by_length.legend(frameon=False, title="RoPE scaling")
    save_figure(figure, path)
