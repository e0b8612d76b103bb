"""The figure of growth: whole, the same for the same rows, and only of the axes that there are."""

from __future__ import annotations

from moejax.bench.growth_figure import draw_growth

ROWS = [
    {"axis": axis, "value": value, "pass": kind, "seconds": value * 0.01, "tokens": 64 * value, "compile_seconds": 3.0}
    for axis in ("experts", "sequence", "layers")
    for kind in (("forward", "forward and backward") if axis == "experts" else (None,))
    for value in (2, 4, 8)
]


def test_the_same_rows_give_the_same_figure(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_growth(ROWS, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]
    first = (tmp_path / "a.svg").read_text()
    assert first == (tmp_path / "b.svg").read_text()
    panels = [axis for axis in ("axes_1", "axes_2", "axes_3", "axes_4") if f'id="{axis}"' in first]
    assert panels == ["axes_1", "axes_2", "axes_3"]  # the fourth place of the grid is not drawn
    draw_growth(ROWS[:3], tmp_path / "one.svg")
    assert 'id="axes_2"' not in (tmp_path / "one.svg").read_text()


def test_a_png(tmp_path):
    draw_growth(ROWS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
