"""The benchmark of saves: its figures hang together, and nothing of it stays."""

import json

from tests.conftest import run_command


def test_a_save_returns_before_it_is_complete(tmp_path):
    small = ["--model.vocab-size", "512", "--model.hidden-size", "32", "--model.intermediate-size", "32", "--model.num-layers", "1"]
    result = run_command(["python", "-m", "moejax.bench", "save", *small, "--directory", tmp_path, "--repeats", "1", "--json", "-"])
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert 0 < values["save_returns_seconds"] < values["save_complete_seconds"]
    assert values["save_at_once_seconds"] > 0 and values["state_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
