"""Every figure shows what the run has, and there is none where the run has nothing to show."""

import base64
from xml.etree import ElementTree

import pytest

from moejax.training import report_figures as figures
from moejax.training.report_data import RunRecord, read_run

DRAWINGS = [value for name, value in vars(figures).items() if name.startswith("draw_")]


def make_record(directory, rows=(), **parts):
    return RunRecord(directory, {}, list(rows), [], [], [])


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_a_figure_is_a_picture_or_nothing(make_run, tmp_path, draw):
    record = read_run(make_run())
    with figures.drawing_style():
        address = figures.encode(draw(record))
        assert draw(make_record(tmp_path)) is None
        assert draw(make_record(tmp_path, [{"step": 1, "loss": None}])) is None
    kind, _, data = address.partition(",")
    assert kind == "data:image/svg+xml;base64"
    text = base64.b64decode(data)
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert len(text) < 200_000


def test_one_row_is_enough(make_run):
    record = read_run(make_run(rows=1))
    assert [draw.__name__ for draw in DRAWINGS if draw(record) is None] == ["draw_evaluation", "draw_router_map", "draw_time"]


def test_the_loss_is_drawn_over_tokens(make_run):
    record = read_run(make_run())
    raw, smoothed = figures.draw_loss(record).axes[0].lines
    assert list(raw.get_xdata()) == [row["tokens"] for row in record.rows]
    assert list(raw.get_ydata()) == [row["loss"] for row in record.rows]
    assert len(smoothed.get_ydata()) == len(record.rows)


def test_smoothing_neither_lags_nor_bends_a_line():
    line = [3.0 * value for value in range(50)]
    assert figures.smooth(line, 5) == pytest.approx(line)
    assert figures.smooth([0, 0, 3, 0, 0], 1) == pytest.approx([0, 1, 1, 1, 0])
    assert figures.smooth([], 3) == []


def test_shares_of_time_fill_the_whole(make_run):
    panel = figures.draw_time(read_run(make_run())).axes[0]
    tops = [max(vertex[1] for vertex in part.get_paths()[0].vertices) for part in panel.collections]
    assert max(tops) == pytest.approx(100)
    assert [part.get_label() for part in panel.collections] == ["steps", "waiting for data", "compiling", "saving", "evaluating"]


def test_skipped_steps_are_marked_where_they_were(make_run):
    record = read_run(make_run())
    assert figures.find_skips(record) == [(410_000_000, 3)]
    marks = [line for line in figures.draw_gradients(record).axes[0].lines if line.get_label() == "steps skipped"]
    assert [line.get_xdata()[0] for line in marks] == [410_000_000]


def test_steps_done_again_are_apart_from_those_that_count(make_run):
    panel = figures.draw_starts(read_run(make_run())).axes[0]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in panel.containers}
    assert widths["steps"] == pytest.approx([220 / 60 * 600 / 640, 220 / 60])
    assert widths["steps done again later"] == pytest.approx([220 / 60 * 40 / 640, 0])


def test_many_layers_become_a_range_and_a_map(make_run):
    record = read_run(make_run(layers=35))
    assert figures.draw_router(record).axes[0].get_legend_handles_labels()[1] == ["range of 35 layers", "mean"]
    assert figures.draw_router_map(record).axes[0].collections[0].get_array().shape == (35, len(record.rows))
    few = figures.draw_router(read_run(make_run("few", layers=2)))
    assert few.axes[0].get_legend_handles_labels()[1] == ["MoE layer 0", "MoE layer 1"]
