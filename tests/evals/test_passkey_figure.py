"""The figure of `passkey`: whole, and the same for the same rows."""

from __future__ import annotations

from moejax.evals.passkey_figure import draw_passkey

ROWS = [
    {"scaling": scaling, "length": length, "accuracy_by_depth": [0.25, length / 256]} for scaling in "abcde" for length in (64, 128, 256)
]


def test_the_same_rows_give_the_same_figure_with_a_panel_a_scaling(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_passkey({"rows": ROWS, "depths": [0.0, 1.0], "original_length": 64}, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert [f'id="axes_{place}"' in drawn for place in range(1, 9)] == [True] * 5 + [False] * 3
