"""metrics.jsonl survives kills and resumes; the line of progress tells the truth."""

import json

import pytest

from moejax.training.metrics import MetricsLog, Progress, format_duration


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "run" / "metrics.jsonl")


def rows(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_every_row_is_one_line_and_written_at_once(log):
    log.rewind(0)
    assert not log.path.exists()
    for step in (1, 2):
        log.write({"step": step, "loss": 1.5})
        assert rows(log)[-1] == {"step": step, "loss": 1.5}
    assert len(rows(log)) == 2


def test_rewinding_drops_what_will_be_written_again_and_a_line_cut_short(log):
    for step in range(1, 6):
        log.write({"step": step})
    log.write_evaluation({"step": 3, "domain": "code", "eval_loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.rewind(3)
    assert [row["step"] for row in rows(log)] == [1, 2, 3, 3]
    log.rewind(3)
    assert len(rows(log)) == 4
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_replaces_the_one_of_its_step_and_domain_alone(log):
    log.write({"step": 2, "loss": 1.0})
    for step, domain, value in [(2, "code", 1.0), (2, "prose", 2.0), (1, "code", 3.0), (2, "code", 4.0)]:
        log.write_evaluation({"step": step, "domain": domain, "eval_loss": value})
    assert [row.get("eval_loss") for row in rows(log)] == [None, 2.0, 3.0, 4.0]


def test_progress_names_step_loss_rate_and_time_left(monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(0, 21, 50, lines.append)
    now[0] += 30.0
    progress.update(1, 5.0)
    now[0] += 2.0
    assert progress.update(11, 4.25) == pytest.approx(10 * 50 / 2.0)
    assert lines[0] == "step 1/21  loss 5.000  (compiled in 0:30)"
    assert lines[1] == "step 11/21  loss 4.250  250 tokens/s  ETA 0:02"  # compiling counts in neither


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
