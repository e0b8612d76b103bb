"""TensorBoard and Weights & Biases get every number of every row, once and at once."""

import importlib.machinery
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest

from moejax.config import RunConfig, TrainConfig, UserError
from moejax.training import trackers
from moejax.training.trackers import TensorBoard, name_values, open_trackers, require_wandb

ROW = {"step": 10, "tokens": 640, "loss": 2.5, "grad_norm": None, "loads": [1.5, None, 2.0]}
EVALUATION = {"step": 10, "tokens": 640, "domain": "code", "eval_loss": 1.5}


def read_events(directory):
    """(step, {tag: value}, status of the session) of all event files in the order of their names, as TensorBoard reads them."""
    from tensorboardX.proto import event_pb2

    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            yield event.step, {value.tag: value.simple_value for value in event.summary.value}, event.session_log.status
            data = data[16 + length :]


def test_values_have_names_that_fall_into_folders():
    assert dict(name_values(ROW)) == {"tokens": 640, "loss": 2.5, "loads/00": 1.5, "loads/02": 2.0}
    assert dict(name_values(EVALUATION)) == {"code/tokens": 640, "code/eval_loss": 1.5}


def test_events_are_in_the_file_when_a_row_was_written(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.write(ROW)
    board.write(EVALUATION)
    (_, _, _), (first, _, status), row, evaluation = read_events(tmp_path / "tensorboard")  # it is not closed yet, as in a kill
    assert (first, status) == (1, 1)
    assert row[:2] == (10, {"tokens": 640, "loss": 2.5, "loads/00": 1.5, "loads/02": 2.0})
    assert evaluation[:2] == (10, {"code/tokens": 640, "code/eval_loss": 1.5})
    board.close()


def test_a_resumed_run_hides_what_it_does_again(tmp_path):
    """TensorBoard drops events from the step of a later START on."""
    for start, steps in ((0, (1, 2, 3, 4)), (2, (3, 4))):  # within one second
        board = TensorBoard(tmp_path, start)
        for step in steps:
            board.write({"step": step, "loss": float(step + start)})
        board.close()
    shown = {}
    for step, values, status in read_events(tmp_path):
        if status == 1:
            shown = {s: v for s, v in shown.items() if s < step}
        if values:
            shown[step] = values["loss"]
    assert shown == {1: 1.0, 2: 2.0, 3: 5.0, 4: 6.0}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb that keeps what it is told."""
    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    calls = []

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "made-up",
            log=lambda values: calls.append(("log", values)),
            define_metric=lambda *names, **options: calls.append(("metric", names, options)),
            finish=lambda: calls.append(("finish",)),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_weights_and_biases_see_one_run_over_all_starts(tmp_path, fake_wandb):
    config = RunConfig(name="a", run_dir=str(tmp_path / "run"), train=TrainConfig(wandb="moe", tensorboard=False))
    for _ in range(2):
        (tracker,) = open_trackers(config, 0, print)
        tracker.write(ROW)
        tracker.write(EVALUATION)
        tracker.close()
    inits = [call[1] for call in fake_wandb if call[0] == "init"]
    assert [options["id"] for options in inits] == [None, "made-up"]
    assert all((options["project"], options["name"], options["resume"]) == ("moe", "a", "allow") for options in inits)
    assert inits[0]["config"]["train"]["wandb"] == "moe"
    assert ("metric", ("*",), {"step_metric": "step"}) in fake_wandb
    logged = [call[1] for call in fake_wandb if call[0] == "log"]
    assert logged[0] == {"step": 10, "tokens": 640, "loss": 2.5, "loads/00": 1.5, "loads/02": 2.0}
    assert logged[1] == {"step": 10, "code/tokens": 640, "code/eval_loss": 1.5}
    assert fake_wandb.count(("finish",)) == 2


def test_a_missing_wandb_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(UserError, match=r"train\.wandb='moe'.*pip install wandb"):
        require_wandb(RunConfig(train=TrainConfig(wandb="moe")))
    require_wandb(RunConfig())


def test_a_missing_tensorboard_is_said_and_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    lines = []
    assert open_trackers(RunConfig(run_dir=str(tmp_path)), 0, lines.append) == []
    assert len(lines) == 1
    assert "pip install tensorboardX" in lines[0]
    assert open_trackers(RunConfig(run_dir=str(tmp_path), train=TrainConfig(tensorboard=False)), 0, lines.append) == []
    assert len(lines) == 1
    assert list(tmp_path.iterdir()) == []
