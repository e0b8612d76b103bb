"""The reading of long prompts compiled for TPUs: what its programs are given and looked through for, and one compiled where libtpu is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jaxtyping
import pytest

from moejax.bench import tpu_prompt
from moejax.bench.tpu_prompt import Arguments, abstract_inputs, check_program, long_arctic
from moejax.config import UserError
from moejax.families.arctic import ARCTIC_480B
from moejax.serving.abstract import bytes_per_device
from moejax.sharding import make_mesh


def test_arctic_for_long_texts():
    long, short = long_arctic(32_768, 35), long_arctic(4096, 35)
    assert short == ARCTIC_480B
    assert (long.rope_scaling.kind, long.rope_scaling.factor, long.rope_scaling.original_length) == ("yarn", 8.0, 4096)
    assert dataclasses.replace(long, max_length=4096, rope_scaling=short.rope_scaling) == ARCTIC_480B


@pytest.fixture
def unchecked():
    """Without the checks of types at every call: a cache of shapes has no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_inputs_are_those_of_the_program_and_lie_as_the_mesh_says(unchecked):
    """All 35 layers, 957 GB: shapes alone. The bytes are what the same arrays take when they are there, counted by hand."""
    mesh = make_mesh(expert=2, tensor=4)
    arguments = Arguments(length=1024, chunks=(256,), rows=3)
    variables, tokens, counts, last, cache = abstract_inputs(long_arctic(1024, 35), mesh, arguments, 256)
    assert (tokens.shape, counts.shape, last.shape) == ((3, 256), (3,), (3, 7168))
    experts = 35 * 128 * 3 * 4864 * 7168 * 2
    dense = 478_584_608_768 * 2 - experts
    assert experts // 8 < bytes_per_device(variables) < experts // 8 + dense // 3
    assert bytes_per_device(cache) == 2 * 35 * 3 * 1024 * (8 // 4) * 128 * 2 + 3 * 4
    assert jax.tree.leaves(variables)[0].sharding.mesh == mesh


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%x = bf16[1,8192,7168]{2,1,0} fusion(%a)", []),
        ("%x = bf16[35,1,65536,1,128]{4,3,2,1,0} fusion(%a)", []),
        ("%x = pred[8192,65536]{1,0} fusion(%a)", ["the program has all scores of a chunk, [8192, 65536]"]),
        ("%x = (s32[], f32[7,8192,65536]{2,1,0}) fusion(%a)", ["the program has all scores of a chunk, [7, 8192, 65536]"]),
        ("%x = (s32[], token[]) infeed(%a)", ["the program has a infeed"]),
    ],
)
def test_what_must_not_be_in_a_program(line, expected):
    assert check_program(f"  {line}\n", 8192, Arguments(length=65_536, chunks=(8192,))) == expected


def test_few_scores_may_be_there():
    assert check_program("  %x = f32[7,256,1024]{2,1,0} fusion(%a)\n", 256, Arguments(length=1024, chunks=(256,))) == []


def test_of_a_whole_prompt_one_length_is_no_scores():
    arguments = Arguments(length=32_768, chunks=(32_768,))
    assert check_program("  %x = bf16[1,32768,28672]{2,1,0} fusion(%a)\n", 32_768, arguments) == []
    assert len(check_program("  %x = f32[7,32768,32768]{2,1,0} fusion(%a)\n", 32_768, arguments)) == 1


@pytest.mark.parametrize(("fields", "message"), [({"chunks": (3000,)}, "chunks has 3000, which does not divide"), ({"rows": 0}, "rows=0")])
def test_sizes_that_make_no_program(fields, message):
    with pytest.raises(UserError, match=message):
        Arguments(**fields)


def test_the_table_says_that_nothing_was_run(monkeypatch, capsys):
    row = {"name": "256 tokens a call", "compile_seconds": 2.0, "failures": []}
    row |= {
        f"{part}_bytes": size for part, size in (("weight", 5e9), ("cache", 1e9), ("argument", 6e9), ("temporary", 3e9), ("output", 5e8))
    }
    monkeypatch.setattr(tpu_prompt, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(tpu_prompt, "compile_chunk", lambda *_: row)
    tpu_prompt.run(Arguments(chunks=(256,), expert=2, tensor=4))
    out = capsys.readouterr().out
    assert "compiled for v5p:4x4x4 (expert 2, tensor 4), not run" in out
    assert "| 9.5 " in out and "9.3%" in out  # of 95 GB
    row["failures"] = ["too much"]
    with pytest.raises(SystemExit):
        tpu_prompt.run(Arguments(chunks=(256,), expert=2, tensor=4))
    assert "FAILED 256 tokens a call: too much" in capsys.readouterr().out


@pytest.mark.slow
def test_one_program_compiles(run_command):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed")
    command = ["python", "-m", "moejax.bench", "tpu_prompt", "--topology", "v5p:2x2x2", "--expert", "2", "--tensor", "4", "--layers", "1"]
    result = run_command([*command, "--length", "8192", "--chunks", "4096", "--json", "-"], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert row["failures"] == [] and row["temporary_bytes"] > 0
