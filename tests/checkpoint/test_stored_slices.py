"""Parts of saved arrays are those of the whole, whatever the chunks, which are those of the shards that were saved."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint.arrays import save_arrays
from moejax.checkpoint.stored_slices import StoredSlices
from moejax.config import UserError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("partition", [None, P(None, "e"), P(None, "e", None, "x"), P("x", None, "e")])
def test_parts_are_those_of_the_whole(tmp_path, dtype, partition):
    array = np.arange(2 * 4 * 8 * 6, dtype=np.float32).reshape(2, 4, 8, 6).astype(jax.numpy.dtype(dtype))
    mesh = jax.make_mesh((4, 2), ("e", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    saved = array if partition is None else jax.device_put(array, NamedSharding(mesh, partition))
    save_arrays(tmp_path / "params", {"a": {"kernel": saved}, "b": {"scale": np.arange(5, dtype=np.float32)}})
    slices = StoredSlices(tmp_path / "params")
    assert slices.shapes() == {("a", "kernel"): array.shape, ("b", "scale"): (5,)}
    assert slices.dtype(("a", "kernel")) == array.dtype
    for index in itertools.chain(itertools.product(range(2), range(4)), [(1,), ()]):
        np.testing.assert_array_equal(slices.read(("a", "kernel"), index), array[index])
    np.testing.assert_array_equal(slices.read(("b", "scale"), ()), np.arange(5))
    assert slices.block_of(("b", "scale"), ()) == ()
    if partition is None:  # Orbax saves what lies on one device as one chunk
        assert {slices.block_of(("a", "kernel"), index) for index in itertools.product(range(2), range(4))} == {(0, 0)}


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="params is damaged: its arrays cannot be read"):
        StoredSlices(tmp_path / "params")
