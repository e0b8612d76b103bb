"""Two processes write one checkpoint together, and judge one together; one process reads what they wrote."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.checkpoint import store
from moejax.checkpoint.processes import gather, wait_for_all
from moejax.config import ModelConfig, UserError
from moejax.families.layout import abstract_parameters
from tests.conftest import ROOT

PROCESS = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank = int(sys.argv[1])
jax.distributed.initialize(sys.argv[2], 2, rank)
import numpy as np
from moejax.checkpoint import store
from moejax.checkpoint.processes import gather, wait_for_all
from moejax.config import ModelConfig, UserError
from moejax.families.layout import abstract_parameters
from moejax.training.saving import _find_damage

path, config = Path(sys.argv[3]), ModelConfig(vocab_size=32, hidden_size=16, num_layers=1)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.NamedSharding(mesh, jax.P(None, "x"))

def make(leaf):
    values = np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
    where = sharding if leaf.ndim > 1 else jax.NamedSharding(mesh, jax.P())
    return jax.make_array_from_callback(leaf.shape, where, lambda index: values[index])

params = jax.tree.map(make, abstract_parameters(config))
store.save(path / "a", params, config, optimizer={"m": params["embed"]["embedding"]}, step=3, write_extra=lambda f: (f / str(rank)).touch())
assert (path / "a" / "moejax.json").exists() and (path / "a" / "0").exists() and not (path / "a" / "1").exists()
assert gather(f"process {rank}") == ["process 0", "process 1"]
assert _find_damage(path / "a") is None
wait_for_all("looked")
if rank == 0:
    victim = max((file for file in (path / "a").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[0] ^= 1
    (path / "whole").write_bytes(victim.read_bytes())
    (path / "name").write_text(str(victim))
    victim.write_bytes(data)
wait_for_all("damaged")
damage = _find_damage(path / "a")  # one of them reads that file; both know
assert damage is not None and Path((path / "name").read_text()).name in damage, damage
try:  # where the first cannot begin, the other does not wait for it
    store.save(path / "name" / "b", params, config)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), address, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "cannot save" in said[0][0] and "the first process could not begin to save" in said[1][0]

    config, victim = ModelConfig(vocab_size=32, hidden_size=16, num_layers=1), (tmp_path / "name").read_text()
    with pytest.raises(UserError, match="its checksum is"):
        store.verify(tmp_path / "a")
    with open(victim, "wb") as file:
        file.write((tmp_path / "whole").read_bytes())
    restored = store.restore_params(tmp_path / "a", config)
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(abstract_parameters(config)), strict=True
    ):
        values = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)
        assert np.asarray(leaf).tobytes() == values.tobytes(), path
    assert store.read_metadata(tmp_path / "a").step == 3


def test_one_process_asks_nobody():
    assert gather("alone") == ["alone"]
    wait_for_all("nobody")
