"""The step benchmark: its JSON, and names that are none."""

import json

from tests.conftest import run_command


def test_json_is_all_that_is_printed():
    small = ["--model.vocab-size", "64", "--model.hidden-size", "32", "--model.intermediate-size", "32", "--model.num-layers", "1"]
    result = run_command(["python", "-m", "moejax.bench", "train", *small, "--sequence-length", "16", "--repeats", "2", "--json", "-"])
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert {"tokens_per_second", "flops_per_second", "fraction_of_ceiling", "compile_seconds", "jax", "device"} <= values.keys()
    assert 0 < values["fraction_of_ceiling"] < 2


def test_an_unknown_benchmark_is_refused():
    result = run_command(["python", "-m", "moejax.bench", "nothing"])
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected" in result.stderr
    assert "train" in result.stderr
