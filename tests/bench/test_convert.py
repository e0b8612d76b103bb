"""The benchmark's checkpoint is one that converts, and its figures are all there."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moejax.bench import convert
from moejax.config import UserError
from moejax.families.mixtral import MIXTRAL


def test_it_measures_a_checkpoint_of_several_shards(tmp_path, monkeypatch, capfd):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2}
    monkeypatch.setitem(MIXTRAL.presets, "mixtral_8x7b", dataclasses.replace(MIXTRAL.presets["mixtral_8x7b"], **sizes))
    monkeypatch.setattr(convert, "SHARD_BYTES", 50_000)
    arguments = convert.Arguments(str(tmp_path / "bench"), layers=2, verify=True, json="-")
    convert.run(arguments)
    captured = capfd.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert "mixtral, 2 layers" in captured.err and "every bit is the same" in captured.err
    assert result["source_bytes"] > 2 * 50_000 and result["largest_tensor_bytes"] == 64 * 32 * 2
    assert 0 < result["peak_anonymous_bytes"] < result["allowed_anonymous_bytes"]
    assert len(result["copy_seconds"]) == 2 and len(result["convert_seconds"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_it_removes_nothing_that_was_there(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        convert.run(convert.Arguments(str(tmp_path)))
    with pytest.raises(UserError, match="give --directory"):
        convert.run(convert.Arguments())
