"""The figure of a stream: whole, the same for the same rows, with or without the rows to compare with."""

from __future__ import annotations

from moejax.evals.streaming_figure import draw_streaming

RESULT = {
    "block": 100, "sinks": 4, "window": 28, "trained_length": 32,
    "rows": [
        {"name": name, "loss_by_block": [4.0 + 0.01 * place for place in range(count)], "seconds_by_block": [seconds] * count}
        for name, count, seconds in (("sinks", 40, 0.1), ("window", 40, 0.1), ("full", 7, 0.2), ("rows", 40, None))
    ],
}  # fmt: skip


def test_the_same_rows_give_the_same_figure(tmp_path):
    for name in ("a.svg", "b.svg", "c.png"):
        draw_streaming(RESULT, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and 'id="axes_3"' in drawn
    draw_streaming({**RESULT, "rows": RESULT["rows"][:2]}, tmp_path / "plain.svg")
    assert 'id="axes_3"' not in (tmp_path / "plain.svg").read_text()  # nothing to be compared with
