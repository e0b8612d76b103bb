"""The held-out split: whole documents, stable, of the right size, never empty, for sources of any size."""

from __future__ import annotations

import random

import pytest

from moejax.config import UserError
from moejax.data import held_out as held_out_module
from moejax.data.documents import Document
from moejax.data.held_out import split_documents, split_stream


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_stable_and_of_the_right_size(seed):
    rng = random.Random(seed)
    documents = [Document(f"module{n}", "x" * rng.randrange(100, 2000)) for n in range(200)]
    train, held_out = split_documents(documents, 0.1, seed)
    assert sorted((*train, *held_out), key=lambda d: d.name) == sorted(documents, key=lambda d: d.name)
    assert 0.08 < sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents) <= 0.1
    shuffled = rng.sample(documents, len(documents))
    assert {d.name for d in split_documents(shuffled, 0.1, seed)[1]} == {d.name for d in held_out}
    assert {d.name for d in split_documents(documents, 0.1, seed + 1)[1]} != {d.name for d in held_out}


@pytest.mark.parametrize("count, fraction", [(2, 0.001), (2, 0.999), (3, 0.5), (50, 0.0001)])
def test_neither_side_of_a_split_is_empty(count, fraction):
    train, held_out = split_documents([Document(str(n), "text" * (n + 1)) for n in range(count)], fraction, 0)
    assert train and held_out and len(train) + len(held_out) == count


@pytest.mark.parametrize(
    "text, fraction", [("a\nb\nc\nd\n", 0.25), ("a\nb\nc\nd", 0.001), ("one line", 0.3), ("long first line\nb", 0.9), ("xy", 0.5)]
)
def test_a_single_document_is_cut_with_the_held_out_part_last(text, fraction):
    (train,), (held_out,) = split_documents([Document("only", text)], fraction, 0)
    assert train.text + held_out.text == text and train.text and held_out.text
    assert "\n" not in text or train.text.endswith("\n")
    with pytest.raises(UserError, match="too short"):
        split_documents([Document("only", "x")], 0.5, 0)


def test_a_stream_within_the_head_is_split_as_a_list_is():
    documents = [Document(f"d{n}", "text " * (n + 1)) for n in range(60)]
    marked = list(split_stream(iter(documents), 0.1, 3))
    train, held_out = split_documents(documents, 0.1, 3)
    assert [document for document, _ in marked] == documents
    assert ([d for d, held in marked if not held], [d for d, held in marked if held]) == (train, held_out)


def test_a_long_stream_is_split_without_being_held(monkeypatch):
    monkeypatch.setattr(held_out_module, "HEAD", 20_000)
    read = []

    def stream():
        for n in range(5000):
            read.append(n)
            yield Document(f"d{n}", "x" * 100)

    marked = split_stream(stream(), 0.05, 0)
    next(marked)
    assert len(read) == 200  # the head, and no more
    shares = [held for _, held in marked]
    assert 0.04 < sum(shares) / len(shares) < 0.06 and sum(shares[:199]) == 10
    assert [held for _, held in split_stream(stream(), 0.05, 0)][1:] == shares


def test_evaluation_never_takes_more_than_its_limit(monkeypatch):
    monkeypatch.setattr(held_out_module, "HEAD", 1000)
    monkeypatch.setattr(held_out_module, "LIMIT", 3000)
    held = [document for document, held in split_stream((Document(str(n), "x" * 100) for n in range(2000)), 0.5, 0) if held]
    assert 2900 <= sum(len(document.text) for document in held) <= 3000


def test_two_huge_documents_make_both_sides(monkeypatch):
    monkeypatch.setattr(held_out_module, "HEAD", 10)
    marked = list(split_stream(iter([Document("a", "x" * 100), Document("b", "y" * 50)]), 0.03, 0))
    assert [held for _, held in marked] == [False, True]
