"""metrics.jsonl survives kills and resumes; the line of progress tells the truth."""

import json

import pytest

from moejax.training.metrics import MetricsLog, Progress, format_duration, read_rows


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


def test_rows_are_strict_json_and_read_back(log):
    """NaN and Infinity are no JSON: most readers but Python's refuse them."""
    log.write({"step": 1, "loss": float("nan"), "loads": [1.0, float("inf")], "count": 3})
    assert read_rows(log.path) == [{"step": 1, "loss": None, "loads": [1.0, None], "count": 3}]
    with log.path.open("ab") as file:
        file.write(b'[1]\n{"step": "x"}\n{"loss": 1.0}\n{"step": 2, "lo\xff')
    assert [row["step"] for row in read_rows(log.path)] == [1]
    assert read_rows(log.path.with_name("no.jsonl")) == []


def test_progress_names_step_loss_rate_utilisation_and_time_left():
    lines = []
    progress = Progress(21, lines.append)
    progress.update({"step": 1, "loss": 5.0, "tokens_per_second": 9.0, "mfu": 0.1}, now=130.0, seconds=30.0)
    progress.update({"step": 11, "loss": 4.25, "tokens_per_second": 2500.0, "mfu": 0.123, "skipped_steps": 2}, now=132.0, seconds=2.0)
    progress.update({"step": 12, "loss": float("nan"), "tokens_per_second": 1.0, "mfu": 0.0, "skipped_steps": 0}, now=133.0, seconds=2.0)
    progress.evaluated(12, {"prose": 2.0, "code": 1.5})
    assert lines == [
        "step 1/21  loss 5.000  (compiled in 0:30)",
        "step 11/21  loss 4.250  2,500 tokens/s  MFU 12.3%  ETA 0:02  skipped steps 2",  # compiling counts in neither
        "step 12/21  loss nan  1 tokens/s  MFU 0.0%  ETA 0:02",
        "step 12/21  held-out bits per byte: prose 2.000  code 1.500",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
