"""Our own checkpoints: bit-equal both ways, never half written, and damage named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint.manifest import seal_metadata
from moejax.checkpoint.store import (
    latest_step,
    list_steps,
    prune,
    read_metadata,
    restore_optimizer,
    restore_params,
    save,
    step_directory,
)
from moejax.config import RunConfig, UserError, run_from_json, to_json


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_parameters_come_back_bit_by_bit(tmp_path, small_config, random_tree, assert_equal_trees, dtype, kind):
    tree = random_tree(small_config, dtype)
    save(tmp_path / "a", jax.tree.map(kind, tree), small_config)
    restored = restore_params(tmp_path / "a", small_config)
    assert_equal_trees(tree, restored)
    assert all(isinstance(leaf, jax.Array) and leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(restored))


def test_every_wiring(tmp_path, config, random_tree, assert_equal_trees):
    tree = random_tree(config)
    save(tmp_path / "a", tree, config)
    assert_equal_trees(tree, restore_params(tmp_path / "a", read_metadata(tmp_path / "a").config))


def test_restoring_into_another_dtype(tmp_path, small_config, random_tree):
    tree = random_tree(small_config)
    save(tmp_path / "a", tree, small_config)
    restored = restore_params(tmp_path / "a", small_config, dtype="bfloat16")
    expected = tree["embed"]["embedding"].astype(jnp.bfloat16)
    assert np.asarray(restored["embed"]["embedding"]).tobytes() == expected.tobytes()


def test_saving_and_restoring_sharded(tmp_path, small_config, random_tree, assert_equal_trees):
    tree = random_tree(small_config)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "x")), tree)
    save(tmp_path / "a", jax.device_put(tree, split), small_config)
    for sharding in (None, everywhere, split):
        restored = restore_params(tmp_path / "a", small_config, sharding=sharding)
        assert_equal_trees(tree, restored)
    assert restored["embed"]["embedding"].sharding == split["embed"]["embedding"]


def test_metadata(tmp_path, small_config, random_tree):
    run = RunConfig(name="small", model=small_config)
    save(tmp_path / "a", random_tree(small_config), small_config, step=7, run=to_json(run))
    metadata = read_metadata(tmp_path / "a")
    assert (metadata.config, metadata.step) == (small_config, 7)
    assert run_from_json(metadata.run) == run
    assert json.loads((tmp_path / "a" / "moejax.json").read_text())["family"] == "arctic"


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(optax.warmup_cosine_decay_schedule(0, 1, 2, 10)), optax.contrib.muon(1e-2), optax.sgd(1e-2)],
    ids=["adamw", "muon", "sgd"],
)
def test_optimizer_state_comes_back_bit_by_bit(tmp_path, small_config, random_tree, assert_equal_trees, optimizer):
    tree = jax.tree.map(jnp.asarray, random_tree(small_config))
    state = jax.tree.map(lambda leaf: leaf + 3, optimizer.init(tree))
    save(tmp_path / "a", tree, small_config, optimizer=state)
    assert_equal_trees(state, restore_optimizer(tmp_path / "a", jax.eval_shape(optimizer.init, tree)))


def test_the_state_of_another_optimizer_is_refused(tmp_path, small_config, random_tree):
    tree = jax.tree.map(jnp.asarray, random_tree(small_config))
    save(tmp_path / "a", tree, small_config, optimizer=optax.adam(1e-3).init(tree))
    with pytest.raises(UserError, match="another optimiser or model"):
        restore_optimizer(tmp_path / "a", jax.eval_shape(optax.contrib.muon(1e-3).init, tree))
    shutil.rmtree(tmp_path / "a" / "optimizer")
    with pytest.raises(UserError, match="has no optimizer/"):
        restore_optimizer(tmp_path / "a", jax.eval_shape(optax.adam(1e-3).init, tree))


def test_extra_files_belong_to_it(tmp_path, small_config, random_tree):
    save(tmp_path / "a", random_tree(small_config), small_config, write_extra=lambda path: (path / "tokenizer.model").write_text("x"))
    assert (tmp_path / "a" / "tokenizer.model").read_text() == "x"


def test_an_existing_directory_is_kept_unless_told(tmp_path, small_config, random_tree, assert_equal_trees):
    old = random_tree(small_config)
    new = jax.tree.map(lambda leaf: leaf + 1, old)
    save(tmp_path / "a", old, small_config)
    with pytest.raises(UserError, match="exists already"):
        save(tmp_path / "a", new, small_config)
    assert_equal_trees(old, restore_params(tmp_path / "a", small_config))
    save(tmp_path / "a", new, small_config, overwrite=True)
    assert_equal_trees(new, restore_params(tmp_path / "a", small_config))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no checkpoint of moejax; it is not overwritten"):
        save(tmp_path / "mine", new, small_config, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]


def test_parameters_of_another_model_are_not_saved_or_restored(tmp_path, small_config, random_tree):
    tree = random_tree(small_config)
    other = dataclasses.replace(small_config, intermediate_size=32)
    with pytest.raises(UserError, match=r"mlp/down/kernel is \[16, 24\], expected \[16, 32\]"):
        save(tmp_path / "a", tree, other)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "a", tree, small_config)
    with pytest.raises(UserError, match="is it a checkpoint of another model"):
        restore_params(tmp_path / "a", other)
    tied = dataclasses.replace(small_config, tie_embeddings=True)
    with pytest.raises(UserError, match=r"head/kernel is \[40, 16\], expected nothing"):
        restore_params(tmp_path / "a", tied)


def test_damage_is_named(tmp_path, small_config, random_tree):
    save(tmp_path / "a", random_tree(small_config), small_config)

    def damaged(name):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        return tmp_path / name

    path = damaged("truncated")
    for file in (path / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"truncated/params/.* is truncated: it holds [\d,]+ bytes, manifest.json says"):
        restore_params(path, small_config)
    with pytest.raises(UserError, match="truncated/params is damaged"):
        restore_params(path, small_config, verify=False)
    path = damaged("no_data")
    shutil.rmtree(path / "params" / "d")
    shutil.rmtree(path / "params" / "ocdbt.process_0")
    with pytest.raises(UserError, match=r"no_data/params/.* is missing, and \d+ other files like it"):
        restore_params(path, small_config)
    with pytest.raises(UserError, match="no_data/params is damaged"):
        restore_params(path, small_config, verify=False)
    path = damaged("no_description")
    (path / "params" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="_METADATA is truncated"):
        restore_params(path, small_config)
    with pytest.raises(UserError, match="no_description/params is damaged"):
        restore_params(path, small_config, verify=False)
    path = damaged("no_params")
    shutil.rmtree(path / "params")
    with pytest.raises(UserError, match="has no params/"):
        restore_params(path, small_config)


def test_damaged_metadata_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no moejax\.json"):
        read_metadata(tmp_path)
    for text, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 2}', "is of format 2, this version of moejax reads 1"),
        ('{"format": 1, "model": {}, "step": null, "run": null}', "its checksum does not fit its text"),
    ):
        (tmp_path / "moejax.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_metadata(tmp_path)
    seal_metadata(tmp_path, {"format": 1, "model": {"num_expert": 8}})
    with pytest.raises(UserError, match="did you mean 'num_experts'"):
        read_metadata(tmp_path)


FULL_DISK = """
import resource, sys
import numpy as np
from moejax.checkpoint.store import save, restore_params, read_metadata
from moejax.config import ModelConfig, UserError
from moejax.families.layout import abstract_parameters
import jax
config = ModelConfig(vocab_size=2000, num_layers=2)
draw = lambda seed, leaf: np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)
make = lambda seed: jax.tree.map(lambda leaf: draw(seed, leaf), abstract_parameters(config))
path = sys.argv[1]
save(path, make(1), config)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save(path, make(2), config, overwrite=True)
except UserError as error:
    print(error)
restored = restore_params(path, read_metadata(path).config)
assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make(1)), strict=True))
print("the old one is whole")
"""


def test_a_disk_that_fills_keeps_the_old_checkpoint(tmp_path, run_command):
    """Files may not grow beyond a limit: what Orbax meets is what a full disk or a quota does to it."""
    result = run_command(["python", "-c", FULL_DISK, tmp_path / "a"])
    assert result.returncode == 0, result.stderr
    message, last = result.stdout.splitlines()
    assert message.startswith(f"no room to save {tmp_path / 'a'}: it needs ")
    assert last == "the old one is whole"
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


KILLED = """
import os, signal, sys
import jax, numpy as np
from moejax.checkpoint.store import save
from moejax.config import ModelConfig
from moejax.families.layout import abstract_parameters
config = ModelConfig(vocab_size=300)
tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_parameters(config))
save(sys.argv[1], tree, config, write_extra=lambda path: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_in_the_middle_leaves_no_checkpoint(tmp_path, run_command, small_config, random_tree):
    run = tmp_path / "run"
    save(step_directory(run, 1), random_tree(small_config), small_config, step=1)
    assert run_command(["python", "-c", KILLED, step_directory(run, 2)]).returncode == -9
    assert list_steps(run) == [step_directory(run, 1)]
    assert len(list((run / "checkpoints").iterdir())) == 2  # the hidden remains
    save(step_directory(run, 2), random_tree(small_config), small_config, step=2)
    assert len(list((run / "checkpoints").iterdir())) == 2  # are gone
    assert latest_step(run) == step_directory(run, 2)


def test_steps_of_a_run(tmp_path, small_config, random_tree):
    assert latest_step(tmp_path) is None
    assert list_steps(tmp_path) == []
    tree = random_tree(small_config)
    for step in (20, 100, 3):
        save(step_directory(tmp_path, step), tree, small_config, step=step)
    (tmp_path / "checkpoints" / "00000999").mkdir()  # not complete
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert [path.name for path in list_steps(tmp_path)] == ["00000003", "00000020", "00000100"]
    assert latest_step(tmp_path) == step_directory(tmp_path, 100)
    prune(tmp_path, keep=2)
    assert [path.name for path in list_steps(tmp_path)] == ["00000020", "00000100"]
    prune(tmp_path, keep=5)
    assert len(list_steps(tmp_path)) == 2
    assert step_directory("runs/a", 1234).name == "00001234"


def test_saving_leaves_no_thread_that_keeps_the_process(tmp_path, run_command):
    code = KILLED.replace("lambda path: os.kill(os.getpid(), signal.SIGKILL)", "None")
    result = run_command(["python", "-W", "error", "-c", code, tmp_path / "a"], timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
