"""Each section says something of a full run, and nothing of one that has nothing to say there."""

import pytest

from moejax.training.report_data import RunRecord, read_run
from moejax.training.report_sections import SECTIONS, show_mixture, tell_command, tell_state

ALWAYS = (tell_state, tell_command)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_section_speaks_where_there_is_something_to_say(make_run, tmp_path, section):
    directory = make_run()
    (directory / "curriculum.png").write_bytes(b"\x89PNG")
    assert section(read_run(directory))
    empty = section(RunRecord(tmp_path, {}, [{"step": 1}], [], [], []))
    assert bool(empty) == (section in ALWAYS)


def test_the_mixture_is_the_picture_that_the_run_has_drawn(make_run):
    directory = make_run()
    assert show_mixture(read_run(directory)) == ""
    (directory / "curriculum.png").write_bytes(b"\x89PNG")
    assert "data:image/png;base64,iVBORw==" in show_mixture(read_run(directory))


def test_a_finished_run_is_told_how_to_go_on(make_run):
    directory = make_run(rows=201)
    assert "raise --train.steps" in tell_command(read_run(directory))
