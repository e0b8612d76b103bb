"""Packing, evaluation rows and the preparation of a run's data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moejax.config import DataConfig, Domain, UserError
from moejax.data import pipeline
from moejax.data.sources import Document

LENGTH = 16


def random_documents(seed, count=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 1000, rng.integers(2, 60)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_no_token_and_crosses_no_document(seed):
    documents = random_documents(seed)
    rows = pipeline.pack(documents, LENGTH)
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

    rows = pipeline.pack(random_documents(2), LENGTH)
    assert [leaf.shape for leaf in jax.tree.leaves(rows[0])] == [(LENGTH,)] * 5
    assert isinstance(jax.tree.map(np.copy, rows[0]), pipeline.Batch)


@pytest.mark.parametrize("max_bytes", [None, 1, 100, 5000, 10**7])
def test_evaluation_counts_every_byte_once(tokenizer, documents, max_bytes):
    texts = [*documents, Document("x", "ä▁😀" * 30)]
    rows, utf8_bytes = pipeline.evaluation_rows(tokenizer, texts, LENGTH, max_bytes)
    counted = rows.targets[rows.weights == 1].tolist()
    taken = pipeline.take_bytes(texts, max_bytes)
    assert b"".join(map(tokenizer.token_bytes, counted)).decode() == "".join(document.text for document in taken)
    assert utf8_bytes == sum(len(document.text.encode()) for document in taken) <= (max_bytes or 10**9)
    assert rows.weights.sum() == len(counted) and not {1, 2} & set(counted)
    if max_bytes is None or max_bytes == 10**7:
        assert taken == texts
    elif max_bytes >= 100:
        assert utf8_bytes > max_bytes - 100


def test_evaluation_batches_hold_all_rows_and_padding_only(tokenizer, documents):
    rows, _ = pipeline.evaluation_rows(tokenizer, documents, LENGTH, 3000)
    parts = list(pipeline.iterate_rows(rows, 7))
    assert all(part.tokens.shape == (7, LENGTH) for part in parts)
    joined = pipeline.Batch(*map(np.concatenate, zip(*parts, strict=True)))
    count = len(rows.tokens)
    assert all((left[:count] == right).all() for left, right in zip(joined, rows, strict=True))
    assert not joined.weights[count:].any() and not joined.segments[count:].any()


def test_gzip_reads_the_same_bytes(documents):
    assert 0 < pipeline.gzip_bits_per_byte(documents, 4000) < 8
    assert pipeline.gzip_bits_per_byte([Document("x", "a" * 10**5)]) < 0.02
    with pytest.raises(UserError, match="no held-out text"):
        pipeline.gzip_bits_per_byte([])


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(10):
        (tmp_path / "text" / f"{n}.txt").write_text(f"file {n} has some words, and tells a short story\n" * (n + 5))
    domains = (Domain("sql", "builtin:sql", max_megabytes=0.025), Domain("mine", str(tmp_path / "text")))
    return DataConfig(domains=domains, sequence_length=LENGTH, max_megabytes=0.05, held_out_fraction=0.2)


def test_preparing_again_gives_the_same(data, tmp_path):
    lines: list[str] = []
    first = pipeline.prepare(data, 512, tmp_path / "run", lines.append)
    assert [line.split(":")[0] for line in lines] == ["sql", "mine"]
    assert sum(len(d.text.encode()) for d in first.held_out["sql"]) + first.rows["sql"].num_tokens > 0
    again = pipeline.prepare(data, 512, tmp_path / "run", lines.append)
    assert "kept" in lines[-1]
    (tmp_path / "run" / "data.npz").unlink()
    anew = pipeline.prepare(data, 512, tmp_path / "run", lines.append)
    for other in (again, anew):
        assert other.tokenizer.model_bytes == first.tokenizer.model_bytes and other.held_out == first.held_out
        for name in ("sql", "mine"):
            assert (other.rows[name].ids == first.rows[name].ids).all() and (other.rows[name].sizes == first.rows[name].sizes).all()
    assert first.tokenizer.vocab_size <= 512
    trained_on = {
        first.tokenizer.decode(ids.tolist()) for ids in np.split(first.rows["mine"].ids, np.cumsum(first.rows["mine"].sizes)[:-1])
    }
    assert (
        trained_on.isdisjoint(document.text for document in first.held_out["mine"]) and len(trained_on) + len(first.held_out["mine"]) == 10
    )


def test_generated_text_is_read_in_proportion_to_its_weight(data, tmp_path):
    prepared = pipeline.prepare(data, 512, tmp_path, lambda line: None)
    everything = len(prepared.tokenizer.decode(prepared.rows["sql"].ids.tolist()))
    everything += sum(len(document.text) for document in prepared.held_out["sql"])
    assert 0.9 * 25_000 < everything <= 25_000


def test_a_given_tokenizer_is_used_kept_and_checked(data, tokenizer, tmp_path):
    import dataclasses

    tokenizer.save(tmp_path / "given")
    given = dataclasses.replace(data, tokenizer=str(tmp_path / "given"))
    with pytest.raises(UserError, match=rf"given'? has {tokenizer.vocab_size} pieces but model.vocab_size=512; set --model.vocab-size"):
        pipeline.prepare(given, 512, tmp_path / "run", lambda line: None)
    prepared = pipeline.prepare(given, 1024, tmp_path / "run", lambda line: None)
    assert prepared.tokenizer.model_bytes == tokenizer.model_bytes == (tmp_path / "run" / "tokenizer.model").read_bytes()
    pipeline.prepare(data, 512, tmp_path / "other", lambda line: None)
    with pytest.raises(UserError, match="begun with another tokenizer"):
        pipeline.prepare(given, 1024, tmp_path / "other", lambda line: None)
