"""The checkpoints of a run: exact although the state is given away, whole or not there, and never lost to a damaged file."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint import store
from moejax.checkpoint.manifest import MANIFEST, list_files
from moejax.config import DataConfig, ModelConfig, RunConfig, Stage, TrainConfig, UserError
from moejax.data_config import Domain
from moejax.model.transformer import Transformer
from moejax.training.saving import Saver, steps_to_take
from moejax.training.state import TrainState, abstract_state, create_optimizer, stored_part

MODEL = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, num_experts=8)
CONFIG = RunConfig(model=MODEL, data=DataConfig(sequence_length=16), train=TrainConfig(batch_size=4))


def make_saver(directory, write_extra=lambda folder: None, model=MODEL, **train) -> tuple[Saver, list[str]]:
    lines: list[str] = []
    config = dataclasses.replace(CONFIG, run_dir=str(directory), model=model, train=dataclasses.replace(CONFIG.train, **train))
    return Saver(config, write_extra, lines.append), lines


def abstract(model=MODEL) -> TrainState:
    return abstract_state(Transformer(model), create_optimizer(CONFIG.train))


def make_state(step: int, model=MODEL) -> TrainState:
    """A state of random numbers; nothing is compiled for it."""
    generator = np.random.default_rng(step)

    def draw(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(generator.normal(size=leaf.shape) if floating else np.full(leaf.shape, step), leaf.dtype)

    return jax.tree.map(draw, abstract(model)).replace(step=jnp.int32(step))


def copy_to_host(state):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


def assert_equal_states(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


def list_names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def split_over(mesh, state):
    """Each leaf split over the mesh's axes along the first dimensions that they divide: params, and moments like them."""

    def choose(leaf):
        axes: list[str | None] = [None] * leaf.ndim
        for axis, size in mesh.shape.items():
            free = [i for i, width in enumerate(leaf.shape) if axes[i] is None and width % size == 0]
            if free:
                axes[free[-1]] = axis
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(choose, state)


def make_mesh(*sizes: int):
    names = ("x", "y")[: len(sizes)]
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes), devices=jax.devices()[:count])


# -- writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_is_of_the_step_it_was_taken_at(tmp_path, devices):
    """Steps that overwrite the buffers run while it is written; several times, with leaves large enough that writing takes a while."""
    model = dataclasses.replace(MODEL, vocab_size=4096, hidden_size=128)
    state = make_state(0, model)
    if devices > 1:
        state = jax.device_put(state, split_over(make_mesh(devices), state))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = step(state)
    pointer = state.params["head"]["kernel"].addressable_shards[0].data.unsafe_buffer_pointer()
    state = step(state)  # with nobody looking, a step does overwrite what it was given
    assert state.params["head"]["kernel"].addressable_shards[0].data.unsafe_buffer_pointer() == pointer
    saver, _ = make_saver(tmp_path, model=model, keep_checkpoints=9)
    expected = {}
    for _ in range(3):
        expected[int(state.step)] = copy_to_host(state)
        saver.save(state)
        for _ in range(3):
            state = step(state)
    saver.wait()
    for number, one in expected.items():
        directory = store.step_directory(tmp_path, number)
        assert_equal_states(one.params, store.restore_params(directory, model))
        assert_equal_states(stored_part(one), store.restore_optimizer(directory, stored_part(abstract(model))))


def test_saving_does_not_wait_for_the_writing_and_nothing_shows_before_its_end(tmp_path):
    let_go, begun = threading.Event(), threading.Event()

    def write_extra(folder):
        begun.set()
        assert let_go.wait(60)

    saver, _ = make_saver(tmp_path, write_extra)
    saver.save(make_state(1))  # returns, although the writing does not end
    assert begun.wait(60)
    saver.poll()
    assert store.list_steps(tmp_path, also_incomplete=True) == []
    second = threading.Thread(target=saver.save, args=(make_state(2),))
    second.start()
    time.sleep(0.2)
    assert second.is_alive()  # at most one is being written
    let_go.set()
    second.join()
    saver.wait()
    assert list_names(tmp_path) == ["00000001", "00000002"]


def test_what_a_checkpoint_says(tmp_path):
    saver, _ = make_saver(tmp_path, seed=7)
    with saver:
        saver.save(make_state(5))
    metadata = store.read_metadata(store.step_directory(tmp_path, 5))
    assert (metadata.step, metadata.rows_read, metadata.random) == (5, 20, {"seed": 7, "step": 5})
    assert metadata.run["train"]["seed"] == 7


def test_a_checkpoint_that_fails_is_said_once_at_the_next_call(tmp_path):
    saver, _ = make_saver(tmp_path)
    saver.save(make_state(1))
    saver.wait()

    def fill_disk(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver.write_extra = fill_disk
    for next_call in (saver.wait, lambda: saver.save(make_state(3)), lambda: saver.__exit__(None, None, None)):
        saver.save(make_state(2))
        with pytest.raises(UserError, match=r"no room to save .*/00000002: .* earlier checkpoints are unchanged"):
            next_call()
        saver.wait()
        assert list_names(tmp_path) == ["00000001"]
    saver.save(make_state(2))
    deadline = time.monotonic() + 60
    with pytest.raises(UserError, match="no room to save"):
        while time.monotonic() < deadline:
            saver.poll()
            time.sleep(0.01)
    store.verify(store.step_directory(tmp_path, 1))


def test_what_ended_the_run_is_not_hidden_by_what_ended_its_checkpoint(tmp_path):
    def fail(folder):
        raise UserError("no room")

    saver, lines = make_saver(tmp_path, fail)
    with pytest.raises(ZeroDivisionError), saver:
        saver.save(make_state(1))
        raise ZeroDivisionError
    assert lines == ["the last checkpoint was not saved: no room"]


def test_which_checkpoints_are_kept(tmp_path):
    saver, _ = make_saver(tmp_path, keep_checkpoints=1, keep_every=2)
    with saver:
        for step in range(1, 6):
            saver.save(make_state(step))
    assert list_names(tmp_path) == ["00000002", "00000004", "00000005"]


# -- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, (8,), (4,), (2, 4), (1,)], ids=str)
def test_a_checkpoint_of_eight_devices_goes_on_on_any_mesh(tmp_path_factory, eight, sizes):
    directory, state = eight
    target = abstract()
    if sizes is not None:
        shardings = split_over(make_mesh(*sizes), target)
        describe = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        target = jax.tree.map(describe, target, shardings)
    restored = make_saver(directory)[0].restore(target)
    assert restored is not None
    assert_equal_states(state, restored)
    for part in ("params", "optimizer_state"):
        for leaf, wanted in zip(jax.tree.leaves(getattr(restored, part)), jax.tree.leaves(getattr(target, part)), strict=True):
            assert leaf.sharding == (wanted.sharding or store.first_device())


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(directory, state) of a run saved from eight devices."""
    directory, state = tmp_path_factory.mktemp("eight"), make_state(3)
    saver, _ = make_saver(directory)
    with saver:
        saver.save(jax.device_put(state, split_over(make_mesh(8), state)))
    return directory, state


def test_unrolled_layers_go_to_their_devices_too(tmp_path):
    model = dataclasses.replace(MODEL, scan_layers=False, num_layers=2)
    state, (saver, _) = make_state(2, model), make_saver(tmp_path, model=model)
    with saver:
        saver.save(state)
    mesh = make_mesh(2)
    target = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, split_over(mesh, state))
    restored = make_saver(tmp_path, model=model)[0].restore(target)
    assert_equal_states(state, restored)
    assert [leaf.sharding for leaf in jax.tree.leaves(restored.params)] == [leaf.sharding for leaf in jax.tree.leaves(target.params)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run with checkpoints of the steps 20 and 40."""
    directory = tmp_path_factory.mktemp("two")
    saver, _ = make_saver(directory, lambda folder: (folder / "tokenizer.model").write_bytes(b"pieces" * 50) and None)
    with saver:
        saver.save(make_state(20))
        saver.save(make_state(40))
    return directory


def damage_each_file(checkpoint: Path):
    """(what was done, how to undo it) for every file of a checkpoint, truncated, with a bit flipped, gone; and one file too many."""
    generator = np.random.default_rng(0)
    for name in list_files(checkpoint):
        path = checkpoint / name
        whole = path.read_bytes()
        bit = int(generator.integers(8 * len(whole)))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        for what, data in (("truncated", whole[: len(whole) // 2]), ("flipped", bytes(flipped)), ("deleted", None)):
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            yield f"{what} {name}", name
            path.write_bytes(whole)
    (checkpoint / "params" / "stray").write_bytes(b"")
    yield "extra params/stray", "params/stray"
    (checkpoint / "params" / "stray").unlink()


def test_no_damaged_file_loses_the_run(two, monkeypatch):
    """Every file of the newest checkpoint in turn; one line says which, and the checkpoint before is taken."""
    target, before = abstract(), make_state(20)
    newest, aside = two / "checkpoints" / "00000040", two / "checkpoints" / "damaged-00000040"
    read, count = Saver._read, 0
    for what, name in damage_each_file(newest):
        saver, lines = make_saver(two)
        if count % 10:  # what is read afterwards is the same, whatever was damaged
            monkeypatch.setattr(Saver, "_read", lambda self, directory, step, target: before.replace(step=jnp.int32(step)))
        else:
            monkeypatch.setattr(Saver, "_read", read)
        restored = saver.restore(target)
        assert_equal_states(before, restored)
        line, last = lines
        assert line.startswith(f"checkpoints/00000040 is damaged ({'has no ' if what == 'deleted moejax.json' else ''}{name}"), (what, line)
        assert "; going on from checkpoints/00000020" in line and "\n" not in line
        assert last == f"resuming {two} at step 20"
        assert list_names(two) == ["00000020", "damaged-00000040"]
        aside.rename(newest)
        count += 1
    assert count > 3 * 10
    restored = make_saver(two)[0].restore(target)
    assert int(restored.step) == 40


def damage(checkpoint: Path) -> None:
    victim = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])


def test_what_is_damaged_moves_aside_and_its_step_is_written_again(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    damage(run / "checkpoints" / "00000040")
    saver, _ = make_saver(run)
    assert int(saver.restore(abstract()).step) == 20
    with saver:
        saver.save(make_state(40))
    assert list_names(run) == ["00000020", "00000040", "damaged-00000040"]
    assert int(make_saver(run)[0].restore(abstract()).step) == 40
    shutil.copytree(two / "checkpoints" / "00000040", run / "checkpoints" / "00000060")
    (run / "checkpoints" / "00000050").mkdir()  # nothing in it
    damage(run / "checkpoints" / "00000060")
    saver, lines = make_saver(run)
    assert int(saver.restore(abstract()).step) == 40
    assert re.fullmatch(
        r"checkpoints/00000060 is damaged \(\S+ is truncated: .*\); checkpoints/00000050 is damaged \(has no moejax\.json: .*\); going on "
        r"from checkpoints/00000040 .*damaged-00000060, checkpoints/damaged-00000050\)",
        lines[0],
    )
    assert list_names(run) == ["00000020", "00000040", "damaged-00000050", "damaged-00000060"]  # the older one made room


def test_a_run_never_starts_over_by_itself(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    for path in store.list_steps(run):
        damage(path)
    for _ in range(2):  # and it stays so
        with pytest.raises(
            UserError, match=r"none of the checkpoints of .* is whole: checkpoints/00000040 .*; checkpoints/00000020 .*start"
        ):
            make_saver(run)[0].restore(abstract())
        assert list_names(run) == ["00000020", "00000040"]
    shutil.rmtree(run / "checkpoints" / "00000020")
    (run / "checkpoints" / "00000040").rename(run / "checkpoints" / "damaged-00000040")
    with pytest.raises(UserError, match="holds damaged checkpoints only"):
        make_saver(run)[0].restore(abstract())
    assert make_saver(tmp_path / "new")[0].restore(abstract()) is None


def test_each_file_is_summed_once(two, monkeypatch):
    from moejax.checkpoint import manifest

    seen = []
    sum_file = manifest.sum_file
    monkeypatch.setattr(manifest, "sum_file", lambda path: seen.append(path) or sum_file(path))
    make_saver(two)[0].restore(abstract())
    assert len(seen) == len(set(seen)) == len(list_files(two / "checkpoints" / "00000040")) - 2  # the manifest and moejax.json apart
    assert all(path.name != MANIFEST for path in seen)


def test_a_whole_checkpoint_of_another_optimizer_is_not_damaged(two):
    target = abstract_state(Transformer(MODEL), create_optimizer(TrainConfig(optimizer="muon")))
    with pytest.raises(UserError, match="another optimiser"):
        make_saver(two)[0].restore(target)
    assert list_names(two) == ["00000020", "00000040"]


# -- where the data goes on ---------------------------------------------------------------------------------------------


def test_another_batch_size_goes_on_at_the_same_row(two, tmp_path):
    """40 steps of 4 rows are 160 rows: batch 10 of 16 rows comes next."""
    run = tmp_path / "run"
    shutil.copytree(two, run)
    saver, _ = make_saver(run, batch_size=16)
    assert saver.first_batch(0) == 0
    state = saver.restore(abstract())
    assert (saver.rows_read(40), saver.first_batch(40), saver.first_batch(42)) == (160, 10, 12)
    with saver:
        saver.save(state.replace(step=jnp.int32(42)))
    assert store.read_metadata(store.step_directory(run, 42)).rows_read == 192
    saver, _ = make_saver(run, batch_size=12, accumulation_steps=2)
    saver.restore(abstract())
    assert (saver.rows_read(43), saver.first_batch(42)) == (204, 16)


@pytest.mark.parametrize(("accumulation", "sizes"), [(1, "2, 4, 5, 8, 10"), (2, "2, 4, 8, 10, 16")])
def test_a_batch_size_that_would_cut_a_batch_is_refused(two, accumulation, sizes):
    saver, _ = make_saver(two, batch_size=6, accumulation_steps=accumulation)
    with pytest.raises(UserError, match=rf"train\.batch_size=6 does not divide the 160 rows that .* has read; go on with {sizes}$"):
        saver.restore(abstract())


def test_a_length_in_tokens_is_kept_when_the_batch_size_changes(two):
    """10,240 tokens are 640 rows of 16; 160 of them are read after 40 steps."""
    data = DataConfig(domains=(Domain("a", "builtin:sql"),), stages=(Stage(10_240, {"a": 1.0}),), sequence_length=16)

    def count(directory, batch_size, steps=None):
        train = dataclasses.replace(CONFIG.train, batch_size=batch_size, steps=steps)
        return steps_to_take(dataclasses.replace(CONFIG, run_dir=str(directory), data=data, train=train))

    assert (count(two, 4), count(two, 8), count(two, 16), count(two, 7)) == (160, 100, 70, 40 + 69)
    assert (count("nowhere", 8), count(two, 8, steps=50)) == (80, 50)
