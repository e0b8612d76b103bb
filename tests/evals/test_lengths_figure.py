"""The figure of `lengths`: whole, and the same for the same rows."""

from __future__ import annotations

from moejax.evals.lengths_figure import draw_lengths

ROWS = [
    {"scaling": scaling, "length": length, "nats_a_token": place + 9.0, "positions": [length / 2, length], "nats_by_position": [3.0, 4.0]}
    for place, scaling in enumerate(("none", "yarn:4"))
    for length in (64, 128)
]


def test_the_same_rows_give_the_same_figure(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_lengths({"rows": ROWS, "scored": 8, "original_length": 64}, tmp_path / name)
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]
    draw_lengths({"rows": ROWS[:2], "scored": 8, "original_length": 64}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() != (tmp_path / "b.svg").read_text()
