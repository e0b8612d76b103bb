"""The installed Orbax restores what is written piece by piece, bit by bit and into any sharding; one that does not is caught here."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint import stream
from moejax.checkpoint.arrays import describe_arrays, restore_arrays
from moejax.checkpoint.stream import is_finite, list_chunks, open_array, plan_array, view_codes, write_descriptions, write_piece
from moejax.families.layout import flatten_leaves, insert_leaf

SHAPES = {  # path -> (shape, axes that pieces are indexed by)
    ("embed", "embedding"): ((40, 16), 0),
    ("final_norm", "scale"): ((16,), 0),
    ("layers", "block_0", "moe", "up", "kernel"): ((2, 4, 24, 16), 2),
    ("layers", "block_0", "moe", "router", "kernel"): ((2, 4, 16), 1),
    ("layers", "block_0", "attention_norm", "scale"): ((2, 16), 1),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 200 bytes, so that small arrays are cut too."""
    monkeypatch.setattr(stream, "LARGEST_CHUNK", 200)


def write_tree(directory, dtype):
    """Random arrays written in pieces, in no order: (the tree, the layouts, the sums)."""
    generator = np.random.default_rng(0)
    layouts = {path: plan_array(path, shape, np.dtype(jnp.dtype(dtype)), stacked) for path, (shape, stacked) in SHAPES.items()}
    write_descriptions(directory, layouts)
    tree, sums = {}, {}
    for path, (shape, stacked) in reversed(SHAPES.items()):
        array = generator.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
        insert_leaf(tree, path, array)
        for index in reversed(list(np.ndindex(shape[:stacked]))):
            sums |= write_piece(directory, layouts[path], index, array[(*index, ...)])
    return tree, layouts, sums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_orbax_restores_it_bit_by_bit(tmp_path, small_chunks, assert_equal_trees, dtype):
    tree, layouts, sums = write_tree(tmp_path / "params", dtype)
    stored = describe_arrays(tmp_path / "params")
    assert {path: (tuple(leaf.shape), jnp.dtype(leaf.dtype)) for path, leaf in stored.items()} == {
        path: (shape, jnp.dtype(dtype)) for path, (shape, _) in SHAPES.items()
    }
    targets = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), tree
    )
    assert_equal_trees(tree, restore_arrays(tmp_path / "params", targets))
    for path, array in flatten_leaves(tree).items():
        assert np.asarray(open_array(tmp_path / "params", layouts[path]).read().result()).tobytes() == array.tobytes()
    written = {
        str(path.relative_to(tmp_path / "params")): path.stat().st_size for path in (tmp_path / "params").rglob("*") if path.is_file()
    }
    assert {name: entry.bytes for name, entry in sums.items()}.items() <= written.items()
    assert len(written) == len(sums) + len(SHAPES) + 3  # a .zarray for each array, and three files of Orbax


def test_the_ordinary_reading_of_orbax_takes_it_too(tmp_path, assert_equal_trees):
    tree, _, _ = write_tree(tmp_path / "params", "float32")
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "params", args=ocp.args.PyTreeRestore(tree))
    assert_equal_trees(tree, jax.tree.map(np.asarray, restored))


@pytest.mark.parametrize("axes", [("x", None), (None, "x")])
def test_each_device_gets_its_part_and_reads_little_more(tmp_path, small_chunks, assert_equal_trees, axes):
    tree, layouts, _ = write_tree(tmp_path / "params", "bfloat16")
    mesh = jax.make_mesh((2, 4), ("e", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    path = ("layers", "block_0", "moe", "up", "kernel")

    def shard(array):
        spec = PartitionSpec(None, "e", *axes) if array.ndim == 4 else PartitionSpec()
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    restored = restore_arrays(tmp_path / "params", jax.tree.map(shard, tree))
    assert_equal_trees(tree, restored)
    array = restored["layers"]["block_0"]["moe"]["up"]["kernel"]
    assert array.sharding.spec == PartitionSpec(None, "e", *axes)
    assert len({str(piece.index) for piece in array.addressable_shards}) == 8
    # With the files of one half of the experts gone, the devices of the other half still find all of theirs.
    names = [name for layer in range(2) for expert in (2, 3) for name in list_chunks(layouts[path], (layer, expert))]
    for name in names:
        (tmp_path / "params" / name).unlink()
    half = open_array(tmp_path / "params", layouts[path])[:, :2].read().result()
    assert half.tobytes() == tree["layers"]["block_0"]["moe"]["up"]["kernel"][:, :2].tobytes()


@pytest.mark.parametrize("rows, columns", [(14336, 4096), (4096, 14336), (32000, 4096), (4864, 7168), (16384, 6144), (33, 400_009), (2, 8)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunks_are_small_whole_parts_cut_along_both_widths(rows, columns, dtype):
    layout = plan_array(("w",), (3, 8, rows, columns), np.dtype(jnp.dtype(dtype)), 2)
    assert layout.chunks[:2] == (1, 1)
    assert math.prod(layout.chunks) * layout.dtype.itemsize <= 16_000_000
    assert rows % layout.chunks[2] == 0 and columns % layout.chunks[3] == 0
    files = list_chunks(layout, (1, 5))
    covered = np.zeros((rows // layout.chunks[2], columns // layout.chunks[3]), int)
    for name, part in files.items():
        place = tuple(int(number) for number in name.removeprefix("w/").split("."))
        assert place[:2] == (1, 5)
        covered[place[2:]] += 1
        assert [piece.stop - piece.start for piece in part] == list(layout.chunks[2:])
    assert (covered == 1).all()
    if rows * columns > 16_000_000 and rows % 4 == columns % 4 == 0:
        assert rows > layout.chunks[2] and columns > layout.chunks[3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_infinity_are_found_anywhere(tmp_path, dtype):
    numbers = np.full(300_001, np.finfo(np.float16).max, np.float32).astype(jnp.dtype(dtype))
    numbers[::7] *= -1
    numbers[3] = 0
    assert is_finite(view_codes(numbers), numbers.dtype)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, 150_000, 300_000):
            wrong = numbers.copy()
            wrong[place] = bad
            assert not is_finite(view_codes(wrong), wrong.dtype)
    layout = plan_array(("w",), (300_001,), numbers.dtype, 0)
    write_descriptions(tmp_path, {("w",): layout})
    with pytest.raises(ValueError, match="NaN"):
        write_piece(tmp_path, layout, (), wrong)
