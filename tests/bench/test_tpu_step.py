"""A config's training step compiled for devices: here those of this machine, whose compiler answers alike."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from moejax.bench import tpu_step
from moejax.bench.tpu_step import Arguments, compile_step
from moejax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig, UserError

CONFIG = """from moejax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
def config():
    model = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, num_experts=4)
    return RunConfig(
        model=model, mesh=MeshConfig(expert=2, context=2), data=DataConfig(sequence_length=64), train=TrainConfig(batch_size=4)
    )
"""


@pytest.mark.slow
def test_the_step_is_that_of_the_config_on_its_mesh(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.setattr(tpu_step, "topology_devices", lambda topology: jax.devices())
    tpu_step.run(Arguments(config=str(tmp_path / "small.py"), topology="here", json="-"))
    result = json.loads(capsys.readouterr().out)
    assert {axis: size for axis, size in result["mesh"].items() if size > 1} == {"fsdp": 2, "expert": 2, "context": 2}
    assert (result["batch_size"], result["sequence_length"]) == (4, 64)
    assert result["temporary_bytes"] > 0 and result["collectives"]
    lines = tpu_step.tell(result)
    assert "4 x 64 tokens, compiled for here (fsdp 2, expert 2, context 2)" in lines[0] and "not run" in lines[0]


def test_a_mesh_that_the_model_does_not_fit_is_refused_before_anything_is_compiled():
    config = RunConfig(model=ModelConfig(num_experts=6), mesh=MeshConfig(expert=4))
    with pytest.raises(UserError, match=r"mesh\.expert=4 does not divide model\.num_experts=6"):
        compile_step(config, jax.devices())


def test_a_step_that_fits_no_chip_is_one_line(monkeypatch):
    from moejax.training import step

    class Full:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, (191.44G) exceeds 95.74G.\nmore")

    monkeypatch.setattr(step, "train_step", Full())
    config = RunConfig(data=DataConfig(sequence_length=64), train=TrainConfig(batch_size=8))
    with pytest.raises(UserError, match=r"^the step fits no chip: RESOURCE_EXHAUSTED: .*95\.74G\.; use a larger mesh[^\n]*$"):
        compile_step(dataclasses.replace(config, mesh=MeshConfig(expert=2)), jax.devices())
