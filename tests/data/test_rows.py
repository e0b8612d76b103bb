"""Rows of packed documents: nothing lost, nothing crossed, little padding, and nothing read but the row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moejax.config import UserError
from moejax.data.rows import Batch, Rows, pack

LENGTH = 16


def random_documents(seed, count=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 1000, rng.integers(2, 60)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_no_token_and_crosses_no_document(seed):
    documents = random_documents(seed)
    rows = pack(documents, LENGTH)
    predicted = []
    for index in range(len(rows)):
        row = rows[index]
        assert all(array.shape == (LENGTH,) for array in row)
        assert [array.dtype for array in row] == [np.int32, np.int32, np.float32, np.int32, np.int32]
        for segment in range(1, row.segments.max() + 1):
            places = np.flatnonzero(row.segments == segment)
            assert (np.diff(places) == 1).all() and (row.positions[places] == np.arange(len(places))).all()
            # The targets that count are the document's next tokens, and all of the segment counts but its document's end.
            counted = places[row.weights[places] == 1]
            assert (row.targets[counted[:-1]] == row.tokens[counted[1:]]).all() and len(counted) >= len(places) - 1
            predicted.append((row.tokens[places[0]], row.targets[counted].tolist()))
        padding = row.segments == 0
        assert not row.weights[padding].any() and not row.positions[padding].any() and (index == len(rows) - 1 or not padding.any())
    # Read in order, the counted targets are every document without its first token.
    assert list(itertools.chain(*(targets for _, targets in predicted))) == list(itertools.chain(*(ids[1:] for ids in documents)))
    assert sum(map(len, documents)) == rows.num_tokens and len(rows) == -(-(rows.num_tokens - 1) // LENGTH)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_batch_is_a_pytree():
    import jax

    rows = pack(random_documents(2), LENGTH)
    assert [leaf.shape for leaf in jax.tree.leaves(rows[0])] == [(LENGTH,)] * 5
    assert isinstance(jax.tree.map(np.copy, rows[0]), Batch)


@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_what_the_whole_stream_says(seed):
    """The definition, written out over arrays as long as the stream."""
    documents = random_documents(seed, 12)
    rows = pack(documents, LENGTH)
    count = len(rows) * LENGTH + 1
    stream = np.pad(np.concatenate(documents), (0, count - rows.num_tokens))
    document = np.pad(
        np.repeat(np.arange(len(documents)), [len(ids) for ids in documents]), (0, count - rows.num_tokens), constant_values=-1
    )
    for index in range(len(rows)):
        span = slice(index * LENGTH, (index + 1) * LENGTH)
        real = document[span] >= 0
        assert (rows[index].tokens == stream[span]).all()
        assert (rows[index].targets == stream[span.start + 1 : span.stop + 1]).all()
        assert (rows[index].weights == (real & (document[span] == document[span.start + 1 : span.stop + 1]))).all()
        _, segments = np.unique(document[span][real], return_inverse=True)
        assert (rows[index].segments[real] == segments + 1).all()


def test_padding_is_under_three_percent():
    rows = pack(random_documents(3, 400), 256)
    padded = sum(int((rows[index].segments == 0).sum()) for index in range(len(rows)))
    assert padded < 0.03 * 256 * len(rows)


def test_rows_of_a_file_far_larger_than_memory_are_read_alone(tmp_path):
    """Two terabytes of ids, nearly all of them a hole in the file."""
    with (tmp_path / "ids").open("wb") as file:
        file.truncate(2 * 10**12)
        file.seek(2 * 10**12 - 2000)
        file.write(np.arange(1000, dtype="<u2").tobytes())
    rows = Rows(np.memmap(tmp_path / "ids", "<u2", mode="r"), np.array([0, 10**12 - 500, 10**12]), 100)
    assert len(rows) == 10**10
    last = rows[10**10 - 1]
    assert last.tokens.tolist() == list(range(900, 1000)) and last.weights[:-1].all() and not last.weights[-1]
    cut = rows[10**10 - 5]
    assert cut.segments.tolist() == [1] * 100 and cut.positions.tolist() == list(range(100))


def test_less_than_two_tokens_are_refused():
    with pytest.raises(UserError, match="fewer than two tokens"):
        pack([[1]], LENGTH)
