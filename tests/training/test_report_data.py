"""A run's directory is read leniently; what holds no run is refused."""

import itertools
import json

import pytest

from moejax.config import UserError
from moejax.training.report_data import describe_count, describe_seconds, read_run, select, select_layers


def test_a_run_is_read(make_run):
    record = read_run(make_run(rows=50))
    assert (record.name, record.step, record.steps, record.checkpoints) == ("long", 1190, 2000, [900])
    assert [row["step"] for row in record.rows[:3]] == [1, 10, 20]
    assert record.domains == ["prose", "code"]
    assert record.last_evaluation("code")["step"] == 400
    assert record.counts is not None
    assert record.command == "python train.py configs/long.py --train.steps 2000"


def test_what_is_missing_or_from_another_version_is_empty(make_run):
    directory = make_run()
    (directory / "starts.jsonl").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["model"]["of_the_future"] = 1
    del config["train"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\n{"step": 8, "lo')
    record = read_run(directory)
    assert (record.step, record.steps, record.starts, record.counts, record.evaluations) == (7, None, [], None, [])
    assert record.command == f"python train.py configs/long.py --run-dir {directory}"
    assert record.describe_state()[0] == "stopped"
    (directory / "config.json").write_text("{")
    assert read_run(directory).name == "long"


@pytest.mark.parametrize("content", [{}, {"metrics.jsonl": ""}, {"config.json": '{"model_type": "mixtral"}', "model.bin": ""}])
def test_what_is_no_run_is_refused(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"is not the directory of a run.*train\.py") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no run directory"):
        read_run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("ended", "last", "silent", "state"),
    [
        ("done", 2000, 10, "done"),
        (None, 900, 20, "running"),
        (None, 900, 86_400, "stopped"),
        ("interrupted", 900, 20, "interrupted"),
        ("failed: UserError", 900, 20, "failed"),
    ],
)
def test_the_state_of_a_run(make_run, ended, last, silent, state):
    directory = make_run(rows=50)
    start = {"start": 1, "first_step": 1, "last_step": last, "ended": ended, "updated": 1000.0, "seconds": 60.0}
    (directory / "starts.jsonl").write_text(json.dumps(start) + "\n")
    word, sentence = read_run(directory).describe_state(now=1000.0 + silent)
    assert word == state
    assert sentence.endswith(".")


def test_selected_values_are_thinned_evenly_and_end_with_the_last():
    rows = [{"step": step, "tokens": 10 * step, "loss": step / 2} for step in range(1, 1001)]
    tokens, losses = select([*rows, {"step": 1001, "loss": None}, {"step": 1002}], "loss", 100)
    assert len(tokens) == 100
    assert (tokens[-1], losses[-1]) == (10_000, 500)
    assert {later - earlier for earlier, later in itertools.pairwise(tokens)} == {100}
    assert select(rows, "nothing") == ([], [])


def test_selected_layers_have_one_length():
    rows = [{"step": 1, "load": [1.0]}, {"step": 2, "load": [1.0, None]}, {"step": 3, "load": [2.0, 3.0]}]
    tokens, values = select_layers(rows, "load")
    assert tokens == [2, 3]
    assert values[1] == [2.0, 3.0]
    assert values[0][0] == 1
    assert values[0][1] != values[0][1]
    assert select_layers([{"step": 1, "load": []}], "load") == ([], [])


def test_numbers_for_people():
    assert [describe_count(number) for number in (0, 950, 12_345, 1.5e6, 2e9, 3.5e12)] == ["0", "950", "12.3 k", "1.5 M", "2 B", "3.5 T"]
    assert [describe_seconds(s) for s in (12, 300, 9000, 90_000, 2e6)] == ["12 s", "5 min", "2.5 h", "25 h", "23 days"]
