"""The figure of `passkey`: for each scaling, the share of keys found by length and depth."""

from pathlib import Path
from typing import Any

from moejax.figures import new_figure, save_figure


def draw_passkey(result: dict[str, Any], path: Path) -> None:
    """Writes the figure of a result of `passkey` as .svg or .png. Raises UserError where it cannot be written."""
    rows, depths = result["rows"], result["depths"]
    scalings = list(dict.fromkeys(row["scaling"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    columns = min(len(scalings), 4)
    lines = -(-len(scalings) // columns)
    figure = new_figure(0.5 + columns * (0.8 + 0.45 * len(lengths)), lines * (1.0 + 0.38 * len(depths)))
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for scaling, panel in zip(scalings, panels, strict=False):
        found = {row["length"]: row["accuracy_by_depth"] for row in rows if row["scaling"] == scaling}
        shares = [[found[length][place] for length in lengths] for place in range(len(depths))]
        panel.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for line, values in enumerate(shares):
            for column, value in enumerate(values):
                colour = "black" if value > 0.55 else "white"
                panel.text(column, line, f"{value:.0%}", ha="center", va="center", fontsize=7.5, color=colour)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        panel.set(title=scaling, xlabel="tokens")
        # Behind the last length that the model has seen, in front of the first one it has not.
        seen = sum(length <= result["original_length"] for length in lengths)
        if 0 < seen < len(lengths):
            panel.axvline(seen - 0.5, color="#D55E00", linestyle="--", linewidth=2)
    for place in range(0, len(scalings), columns):
        panels[place].set_ylabel("depth of the key")
    for panel in panels[len(scalings) :]:
        panel.remove()
    save_figure(figure, path)
