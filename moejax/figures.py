"""Figures of commands that measure: how one begins, and how it becomes a file that is the same for the same numbers.

matplotlib is imported only where something is drawn.
"""

import io
import logging
from pathlib import Path
from typing import Any

from moejax.checks import UserError
from moejax.results import require_place, write_result

# Okabe and Ito's, which those who see red and green alike can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
MARKERS = "osD^vPX"  # lines differ by more than their colour


def check_figure(file: str | None) -> None:
    """Raises UserError, before anything is measured, for a figure that could not be written, as far as one can see."""
    if file is None:
        return
    if Path(file).suffix not in (".svg", ".png"):
        raise UserError(f"figure={file!r}; expected a file that ends in .svg or .png")
    require_place(file, "--figure")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, whose parts make room for each other."""
    # The first import on a machine reads all its fonts, and would tell of it on stderr.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes it as .svg or .png, whole or not at all; the same figure gives the same file. Raises UserError where that is not possible."""
    import matplotlib

    drawn = io.BytesIO()
    # Without the date and with fixed names inside, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "moejax"}):
        figure.savefig(drawn, format=path.suffix[1:], dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    write_result(path, drawn.getvalue())
