"""Which files a domain has, the order and the amount of its documents, and the errors of what is not there."""

from __future__ import annotations

import json

import pytest

from moejax.config import Domain, UserError
from moejax.data import sources
from moejax.data.documents import Document, Reading


def files(path, **options) -> Domain:
    return Domain("text", str(path), **options)


def read_documents(*arguments) -> list[Document]:
    return list(sources.read_documents(*arguments))


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


def test_patterns_and_formats_choose_files(tree):
    (tree / "data.bin").write_text('{"body": "in a strange file"}\n')
    (tree / "page.html").write_text("<p>page</p>\n")

    def names(path, **options):
        return sorted(document.name for document in read_documents(files(path, **options), 10**6, 0))

    assert names(f"{tree}/*.txt") == ["a.txt"]
    assert names(f"{tree}/**/*.md") == ["deep/er/b.md"]
    assert names(f"{tree}/de*") == ["deep/c.jsonl:1", "deep/c.jsonl:2", "deep/c.jsonl:3", "deep/er/b.md"]
    assert names(tree, format="text") == ["a.txt", "deep/er/b.md", "page.html"]
    assert names(tree, format="jsonl") == ["deep/c.jsonl:1", "deep/c.jsonl:2", "deep/c.jsonl:3"]
    # What is named alone, or by a pattern and a format, is read whatever its name.
    assert names(tree / "data.bin", format="jsonl", text_field="body") == ["data.bin:1"]
    assert names(f"{tree}/*.bin", format="jsonl", text_field="body") == ["data.bin:1"]
    assert names(tree / "data.bin") == ["data.bin"]
    for path, options, message in (
        (f"{tree}/*.nothing", {}, r"nothing' matches no file; check the pattern"),
        (tree, {"format": "parquet"}, "looked for files of format parquet with text in them"),
    ):
        with pytest.raises(UserError, match=message):
            names(path, **options)


def test_bad_text_is_left_out_and_counted(tree):
    (tree / "bad.txt").write_bytes(b"\xff\xff")
    (tree / "bad.jsonl").write_text('{"text": "good"}\nnot json\n{"body": 1}\n')
    reading = Reading(skip_bad=True)
    found = {document.text for document in sources.read_documents(files(tree), 10**6, 0, reading)}
    assert found == {"first\nfile\n", "zweite ä\n", "line 0", "line 1", "line 2", "good"}
    assert (reading.bad, reading.empty) == (3, 1) and reading.consumed == reading.total > 0
    with pytest.raises(UserError, match=r"with --data\.skip-bad$"):
        read_documents(files(tree), 10**6, 0)
    (tree / "only").mkdir()
    (tree / "only" / "x.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match=r"no text found.*\(1 left out as bad, the first: .*x\.jsonl' line 1 is not JSON"):
        list(sources.read_documents(files(tree / "only"), 10**6, 0, Reading(skip_bad=True)))


def test_a_description_changes_with_the_text_and_with_nothing_else(tree):
    before = sources.describe_source(files(tree))
    assert sources.describe_source(files(tree)) == before
    assert before["files"] == 4
    (tree / "a.txt").write_text("first\nline\n")
    changed = sources.describe_source(files(tree))
    assert changed != before
    (tree / ".hidden" / "d.txt").write_text("nobody reads this")
    assert sources.describe_source(files(tree)) == changed
    assert sources.describe_source(Domain("p", "builtin:prose"))["packages"]["jax"]
