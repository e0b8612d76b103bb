"""Plans of runs: the state to the byte, memory as a real run takes it, and, where the compiler for TPUs is, what it makes of a step."""

import dataclasses
import json

import jax
import pytest

from moejax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig, UserError
from moejax.families.flops import count_flops
from moejax.model.transformer import Transformer
from moejax.planning.topology import Topology, open_topology
from moejax.training.plan import filled_rows, plan_mesh, plan_run, require_plannable, state_bytes
from moejax.training.plan_report import tell_plan
from moejax.training.state import create_optimizer, create_state
from tests.conftest import run_command

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_experts=4, max_length=64, dispatch="capacity", remat="full"
    ),
    mesh=MeshConfig(expert=4, fsdp=2),
    data=DataConfig(sequence_length=32),
    train=TrainConfig(steps=3, batch_size=8),
)
LOCAL = Topology("local", tuple(jax.devices()), None)
KEYS = (
    "fits", "bytes_per_device", "hbm_bytes", "predicted_step_seconds", "predicted_mfu", "hidden_all_to_all_forward",
    "hidden_all_to_all_backward", "sequential_hidden_all_to_all_forward", "collectives",
)  # fmt: skip


def test_the_state_s_bytes_are_those_of_a_state():
    mesh = plan_mesh(CONFIG, LOCAL)
    state = create_state(Transformer(CONFIG.model, mesh), create_optimizer(CONFIG.train, 3), 0)
    found = state_bytes(CONFIG, mesh)
    for name, tree in (("parameters", state.params), ("optimizer", state.optimizer_state)):
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device.id == 0)
        assert found[name] == held, name


@pytest.mark.slow
def test_a_plan_of_local_devices_has_all_that_a_plan_has():
    plan = json.loads(json.dumps(plan_run(CONFIG, LOCAL, compare_sequential=False)))
    assert set(KEYS) - {"sequential_hidden_all_to_all_forward"} <= set(plan)
    assert plan["mesh"] == {"fsdp": 2, "expert": 4}
    assert plan["fits"] is True and plan["predicted_step_seconds"] is None  # nothing is known of a CPU's rates
    parts = plan["bytes_per_device"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    # What full rematerialisation keeps of a layer is its input.
    assert parts["activations"] >= 2 * 8 * 32 * 32 * 4 / 8
    assert {"all-to-all", "all-gather"} <= {row["kind"] for row in plan["collectives"]}
    text = "\n".join(tell_plan(plan))
    assert "fsdp 2, expert 4" in text and "fits" in text and "assumptions" in text


def test_rows_that_do_not_divide_are_refused():
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=12))
    with pytest.raises(UserError, match=r"batch_size=12 gives 12 rows at a time, .* = 8 devices do not divide; set --train.batch-size 16"):
        require_plannable(config, LOCAL)


def test_experts_rows_that_hold_tokens():
    mesh = plan_mesh(CONFIG, LOCAL)
    assert filled_rows(CONFIG, mesh) == 1.0
    ragged = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dispatch="ragged"))
    assert filled_rows(ragged, mesh) == 0.25  # room for all that there are
    assert filled_rows(dataclasses.replace(ragged, model=dataclasses.replace(ragged.model, ragged_buffer_factor=2.0)), mesh) == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--plan", "v5p:8x8y"), r"--plan v5p:8x8y: no such topology; expected CHIP:SHAPE with a chip of v4, v5e"),
        (("--plan",), r"--plan needs a value; give --plan TOPOLOGY"),
        (("--plan-json", "x.json"), r"--plan-json belongs to --plan TOPOLOGY; add it"),
        (("--plan", "local", "--plan-json", "nowhere/x.json"), r"--plan-json nowhere/x.json: .* give a file in one that exists"),
        (("--plan", "local", "--plan-search", "soon"), r"--plan-search soon is no number of seconds"),
    ],
)
def test_errors_are_one_line(flags, message, capsys):
    import train

    with pytest.raises(UserError, match=message):
        train.main(["configs/tiny.py", *flags])


@pytest.mark.slow
def test_memory_is_what_a_run_takes(tmp_path):
    """Eight simulated devices are one process: the bytes of all of them, beside what jax itself takes, are its peak."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = run_command(["python", script], timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, taken = json.loads(done.stdout.splitlines()[-1])
    assert 0.75 < planned / taken < 1.1


MEASURE = """
import json, os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import numpy as np
import jax
from moejax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from moejax.data.rows import Batch
from moejax.model.transformer import Transformer
from moejax.planning.topology import open_topology
from moejax.training.hardware import read_status
from moejax.training.placement import place_batch
from moejax.training.plan import plan_mesh, plan_run
from moejax.training.state import create_optimizer, create_state
from moejax.training.step import step_options, train_step

model = ModelConfig(vocab_size=4096, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=4, max_length=512, remat="full")
config = RunConfig(model=model, mesh=MeshConfig(expert=4, fsdp=2), data=DataConfig(sequence_length=512),
                   train=TrainConfig(batch_size=32, steps=3))
topology = open_topology("local")
planned = 8 * plan_run(config, topology, False)["bytes_per_device"]["total"]
before = read_status("self", "VmHWM")
mesh = plan_mesh(config, topology)
transformer, optimizer = Transformer(config.model, mesh), create_optimizer(config.train, 3)
state = create_state(transformer, optimizer, 0)
tokens, ones = np.zeros((32, 512), np.int32), np.ones((32, 512), np.int32)
batch = place_batch(mesh, 32, Batch(tokens, tokens, ones.astype(np.float32), ones, np.tile(np.arange(512, dtype=np.int32), (32, 1))))
for _ in range(2):
    state, _ = train_step(transformer, optimizer, state, batch, step_options(config.train))
    jax.block_until_ready(state)
print(json.dumps([planned, read_status("self", "VmHWM") - before]))
"""


@pytest.mark.slow
def test_a_plan_for_tpus():
    """Compiled by the compiler for TPUs, not run: what fits and what does not, and that work covers the all-to-all as the wiring allows."""
    pytest.importorskip("libtpu")
    model = dataclasses.replace(
        CONFIG.model, vocab_size=1024, hidden_size=1024, intermediate_size=1280, num_heads=8, num_kv_heads=8, num_experts=8,
        max_length=1024, dtype="bfloat16",
    )  # fmt: skip
    config = dataclasses.replace(
        CONFIG, model=model, data=DataConfig(sequence_length=1024), train=dataclasses.replace(CONFIG.train, batch_size=16)
    )
    plan = plan_run(config, open_topology("v5p:2x2x2"))
    assert set(KEYS) <= set(plan)
    assert plan["fits"]
    # Causal attention and recomputing apart, the program's matmuls are the model's.
    assert plan["flops"]["program"] == pytest.approx(4 / 3 * count_flops(model, 16, 1024), rel=0.1)
    assert plan["hidden_all_to_all_forward"] > plan["sequential_hidden_all_to_all_forward"]
    assert 0 < plan["predicted_mfu"] < 1
    default = dataclasses.replace(config, train=dataclasses.replace(config.train, compiler_options="default"))
    exposed = plan_run(default, open_topology("v5p:2x2x2"), compare_sequential=False)
    assert exposed["hidden_all_to_all_forward"] == 0
    assert exposed["predicted_step_seconds"] > plan["predicted_step_seconds"]
