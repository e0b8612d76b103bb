"""`train.py --plan`: what it prints and writes, and what it does where nothing fits."""

import json

import pytest

import train
from moejax.training import plan_command
from moejax.training.plan_command import describe_nearest
from tests.training.test_plan import CONFIG

FLAGS = [
    *("--model.vocab-size", "64", "--model.hidden-size", "32", "--model.intermediate-size", "32", "--model.num-experts", "4"),
    *("--model.num-layers", "1", "--data.sequence-length", "16", "--train.batch-size", "8", "--model.max-length", "16"),
]


@pytest.mark.slow
def test_a_plan_is_printed_and_written_and_nothing_else_is_made(tmp_path, monkeypatch, capsys):
    file = tmp_path / "plan.json"
    train.main(["configs/tiny.py", "--plan", "local", "--plan-json", str(file), "--run-dir", str(tmp_path / "run"), *FLAGS])
    out = capsys.readouterr().out
    assert "tiny on local: 8 devices (fsdp 8), 8 x 16 tokens a step" in out and f"written to {file}" in out
    plan = json.loads(file.read_text())
    assert plan["fits"] and plan["topology"] == "local" and {"jax", "moejax"} <= set(plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.parametrize(("words", "seconds"), [(["--plan-search"], 600.0), (["--plan-search", "30"], 30.0)])
def test_a_search_takes_its_time_or_another(monkeypatch, capsys, words, seconds):
    asked = []
    monkeypatch.setattr(plan_command, "search", lambda config, topology, seconds, tell: (asked.append(seconds) or [], 7))
    train.main(["--plan", "local", *words, "configs/tiny.py", *FLAGS])
    assert asked == [seconds]
    assert f"0 plans within {seconds:.0f} s, 7 not tried" in capsys.readouterr().out


@pytest.mark.parametrize("fitting", [True, False])
def test_what_does_not_fit_names_the_nearest_that_does(monkeypatch, capsys, fitting):
    refused = {"fits": False, "name": "x"}
    nearest = {
        "mesh": {"fsdp": 2, "expert": 4}, "remat": "full", "accumulation_steps": 2, "predicted_step_seconds": 1.5,
        "bytes_per_device": {"total": 2**31},
    }  # fmt: skip
    monkeypatch.setattr(plan_command, "plan_run", lambda config, topology: refused)
    monkeypatch.setattr(plan_command, "find_fitting", lambda config, topology, seconds: nearest if fitting else None)
    monkeypatch.setattr(plan_command, "tell_plan", lambda result: ["it does not fit"])
    plan_command.plan(CONFIG, {"--plan": "local"}, "1.0")
    printed = capsys.readouterr()
    assert "looking for the nearest that fits" in printed.err
    assert printed.out.splitlines() == ["it does not fit", "", describe_nearest(nearest if fitting else None)]
    if fitting:
        assert "--mesh.expert 4 --model.remat full --train.accumulation-steps 2 (2.0 GiB, 1.500 s a step)" in printed.out
