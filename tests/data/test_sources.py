"""Reading documents, the errors of bad files, and splitting off the held-out ones."""

from __future__ import annotations

import json
import random

import pytest

from moejax.config import Domain, UserError
from moejax.data.sources import Document, read_documents, split_documents


def files(path) -> Domain:
    return Domain("text", str(path))


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "a.txt").write_text("first\nfile\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.md").write_bytes("zweite ä\r\n".encode())
    (tmp_path / "deep" / "c.jsonl").write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(3)) + "\n\n")
    (tmp_path / "deep" / "ignored.bin").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("hidden")
    (tmp_path / "empty.txt").write_text(" \n")
    return tmp_path


def test_a_directory_is_read_whole_and_a_file_alone(tree):
    found = {document.name: document.text for document in read_documents(files(tree), 10**6, 0)}
    lines = {f"deep/c.jsonl:{n + 1}": f"line {n}" for n in range(3)}
    assert found == {"a.txt": "first\nfile\n", "deep/er/b.md": "zweite ä\n", **lines}
    assert read_documents(files(tree / "a.txt"), 10**6, 0) == [Document("a.txt", "first\nfile\n")]


@pytest.mark.parametrize("source", ["prose", "code", "sql"])
def test_the_order_is_fixed_by_the_seed_and_the_amount_by_the_limit(source):
    domain = Domain(source, f"builtin:{source}")
    some = read_documents(domain, 60_000, 0)
    assert read_documents(domain, 60_000, 0) == some
    more = read_documents(domain, 120_000, 0)
    assert more[: len(some) - 1] == some[:-1]  # the last may be cut
    assert read_documents(domain, 60_000, 1) != some
    assert sum(len(document.text.encode()) for document in some) <= 60_000 < sum(len(document.text.encode()) for document in more)
    assert len({document.name for document in more}) == len(more)
    assert all(document.text.strip() for document in more)


def test_the_limit_cuts_at_a_line_or_a_character(tmp_path):
    (tmp_path / "lines.txt").write_text("abc\ndef\nghi\n")
    assert read_documents(files(tmp_path / "lines.txt"), 9, 0)[0].text == "abc\ndef\n"
    (tmp_path / "one.txt").write_text("ääää")
    assert read_documents(files(tmp_path / "one.txt"), 5, 0)[0].text == "ää"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: (path / "x.txt").write_bytes(b"ok\xffno"), r"x\.txt' is not UTF-8 text \(byte 0xff at offset 2\)"),
        (lambda path: (path / "x.jsonl").write_text('{"text": "a"}\n{oops\n'), r"x\.jsonl' line 2 is not JSON"),
        (lambda path: (path / "x.jsonl").write_text('{"body": "a"}\n'), r"x\.jsonl' line 1 has no text: got the fields 'body'.*'text'"),
        (lambda path: (path / "x.jsonl").write_text('{"text": "\\ud83d"}\n'), "line 1 has half a surrogate pair"),
        (lambda path: (path / "x.jsonl").write_text("[1]\n"), r"line 1 has no text: got a list"),
        (lambda path: (path / "x.bin").write_text("text"), r"no text found for data domain 'text': looked for \.txt.*point --data\.path"),
        (lambda path: (path / "x.txt").write_text(""), "no text found"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        read_documents(files(tmp_path), 10**6, 0)


def test_sources_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gone' does not exist"):
        read_documents(files(tmp_path / "gone"), 10, 0)
    monkeypatch.setattr("moejax.data.python_text.standard_library_root", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"no text found for data domain 'code'.*standard library.*--data.path"):
        read_documents(Domain("code", "builtin:code"), 10**6, 0)


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
