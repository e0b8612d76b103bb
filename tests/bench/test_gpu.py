"""The command for a GPU: what it refuses, and how it goes on after a failure. Its measurements run in test_gpu_items.py."""

import json

import pytest

from moejax.bench import gpu
from moejax.bench.gpu import Arguments, measure_items, report
from moejax.bench.gpu_items import ITEMS, Sizes
from moejax.config import UserError


def test_without_a_gpu_it_is_one_line(run_command):
    result = run_command(["python", "-m", "moejax.bench", "gpu"])
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "needs an NVIDIA GPU" in result.stderr


def test_an_item_that_is_none():
    with pytest.raises(UserError, match="items has 'atention'; expected some of check_grouped"):
        Arguments(items=("atention",))


def broken(sizes):
    yield {"way": "good", "microseconds": 3.0}
    raise RuntimeError("no room\nanywhere")


def endless(sizes):
    while True:
        yield {"way": "slow"}


def test_a_failure_or_too_little_time_ends_its_item_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(ITEMS, "broken", broken)
    monkeypatch.setitem(ITEMS, "endless", endless)
    clock = iter(range(1000))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(clock)))
    results = measure_items(("broken", "endless"), Sizes(), 10.0)
    assert results["broken"] == [{"way": "good", "microseconds": 3.0}, {"error": "RuntimeError: no room anywhere"}]
    assert {"way": "slow"} in results["endless"]
    assert results["endless"][-1] == {"error": "no time was left for the rest"}
    report(results, str(tmp_path / "gpu.json"))
    assert "error RuntimeError: no room anywhere" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["items"] == results
    report(results, "-")
    assert json.loads(capsys.readouterr().out)["benchmark"] == "gpu"


@pytest.mark.parametrize(("error", "fails"), [(0.001, False), (0.5, True), (float("nan"), True)])
def test_a_kernel_that_is_wrong_fails_the_command(monkeypatch, capsys, error, fails):
    monkeypatch.setattr(gpu, "measure_items", lambda *_: {"check_grouped": [{"way": "moejax", "relative_error": error}, {"error": "no"}]})
    monkeypatch.setattr(gpu.jax, "devices", lambda: [type("Device", (), {"platform": "gpu", "device_kind": "H100"})()])
    monkeypatch.setattr(gpu, "describe_machine", lambda program: {})
    if fails:
        with pytest.raises(SystemExit) as ended:
            gpu.run(Arguments())
        assert ended.value.code == 1
    else:
        gpu.run(Arguments())
    assert "check_grouped" in capsys.readouterr().out
