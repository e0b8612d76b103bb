"""starts.jsonl: what each start of a run came to, and the share of all their time that counts."""

import json

import pytest

from moejax.training.clock import Spent
from moejax.training.starts import StartsLog, count_kept_steps, describe_start, measure_goodput, read_starts


def start(first, last, seconds=100.0, steps=50.0):
    return {"first_step": first, "last_step": last, "seconds": seconds, "step_seconds": steps}


def test_goodput_is_the_share_of_time_in_steps_that_count():
    assert measure_goodput([]) == 0
    assert measure_goodput([start(1, 0)]) == 0
    assert measure_goodput([start(1, 10)]) == 0.5
    assert measure_goodput([start(1, 10), start(11, 20)]) == 0.5  # nothing was done twice
    assert measure_goodput([start(1, 10), start(6, 20)]) == pytest.approx((25 + 50) / 200)  # half of the first is done again
    assert measure_goodput([start(1, 10), start(1, 20)]) == pytest.approx(50 / 200)


def test_a_start_from_an_older_checkpoint_undoes_all_starts_after_it():
    starts = [start(1, 10), start(9, 20), start(15, 30), start(5, 40)]
    assert count_kept_steps(starts) == [4, 0, 0, 36]
    assert count_kept_steps(starts[:3]) == [8, 6, 16]


def test_a_start_is_written_as_it_goes(tmp_path):
    path = tmp_path / "run" / "starts.jsonl"
    log = StartsLog(path)
    log.begin(1, 30.0, {"host": "a"})
    assert read_starts(path)[0]["ended"] is None
    log.tell(device="cpu")
    log.progress(10, Spent(50.0, {"data": 1.0, "compile": 9.0}))
    log.progress(20, Spent(20.0, {"data": 1.0}))
    (found,) = read_starts(path)  # as a kill would leave it
    assert (found["first_step"], found["last_step"], found["seconds"], found["ended"]) == (1, 20, 100.0, None)
    assert (found["step_seconds"], found["startup_seconds"], found["compile_seconds"], found["data_seconds"]) == (59.0, 30.0, 9.0, 2.0)
    assert (found["host"], found["device"]) == ("a", "cpu")
    assert log.goodput == pytest.approx(0.59)
    with path.open("a") as file:
        file.write('{"start": 1, "last_st')  # cut by the kill

    again = StartsLog(path)
    again.begin(11, 10.0, {})
    again.progress(30, Spent(40.0, {}))
    again.end("done")
    first, second = read_starts(path)
    assert first == found
    assert len(path.read_text().splitlines()) == 4  # of the first start one, of the second one as it began, went and ended
    assert (second["first_step"], second["ended"]) == (11, "done")
    assert again.goodput == pytest.approx((59 / 2 + 40) / 150)
    assert [file.name for file in path.parent.iterdir()] == ["starts.jsonl"]


def test_a_start_that_never_began_leaves_no_line(tmp_path):
    log = StartsLog(tmp_path / "starts.jsonl")
    log.progress(3, Spent(1.0))
    log.end("done")
    assert log.goodput == 0
    assert list(tmp_path.iterdir()) == []


def test_lines_that_are_no_starts_are_left_out(tmp_path):
    path = tmp_path / "starts.jsonl"
    lines = (
        '{"start": 1, "first_step": 1}',
        "[1]",
        '{"first_step": 2}',
        '{"start": 2}',
        '{"start": 1, "last_step": 4}',
        '{"start": 1, "las',
    )
    path.write_text("\n".join(lines))
    assert read_starts(path) == [{"start": 1, "first_step": 1, "last_step": 4}]
    assert measure_goodput(read_starts(path)) == 0


def test_a_start_says_what_it_runs_on(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "configs/x.py", "--sample.prompt", "a b"])
    about = describe_start()
    assert about["command"] == "python train.py configs/x.py --sample.prompt 'a b'"
    assert {"python", "jax", "flax"} <= about["versions"].keys()
    json.dumps(about)
    monkeypatch.setattr("sys.argv", ["-c"])
    assert "command" not in describe_start()
