"""One file of each format: what it holds, what is wrong with it, and that little of it is in memory."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc

import pytest

from moejax.config import UserError
from moejax.data import formats
from moejax.data.documents import Reading
from moejax.data.formats import find_format, read_file

TEXTS = ["first ä", "", "third\nof two lines", '{"not": json', "\ufeffmark"]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"number": n, field: text}) + "\n" for n, text in enumerate(texts)))


def write_gz(path, texts, field="text"):
    write_jsonl(path, texts, field)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_zst(path, texts, field="text"):
    import zstandard

    write_jsonl(path, texts, field)
    data = path.read_bytes()
    half = len(data) // 2  # two frames, the cut in the midst of a line
    path.write_bytes(zstandard.ZstdCompressor().compress(data[:half]) + zstandard.ZstdCompressor().compress(data[half:]))


def write_parquet(path, texts, field="text"):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"number": list(range(len(texts))), field: texts}), path, row_group_size=2)


def write_array_record(path, texts, field="text"):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for n, text in enumerate(texts):
        writer.write(json.dumps({"number": n, field: text}).encode() if n % 2 or field != "text" else text.encode())
    writer.close()


WRITERS = {
    "x.jsonl": write_jsonl, "x.jsonl.gz": write_gz, "x.jsonl.zst": write_zst, "x.parquet": write_parquet,
    "x.array_record": write_array_record,
}  # fmt: skip


def read(path, text_field="text", **options):
    reading = Reading(**options)
    documents = list(read_file(path, path.name, find_format(path.name) or "text", text_field, reading))
    return documents, reading


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("field", ["text", "content"])
def test_every_format_gives_its_texts_back(tmp_path, name, field):
    texts = [*TEXTS[:4], *(f"document {n}" for n in range(100))]
    WRITERS[name](tmp_path / name, texts, field)
    documents, reading = read(tmp_path / name, field)
    assert [document.text for document in documents] == texts
    assert len({document.name for document in documents}) == len(texts) and reading.bad == 0


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.md.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    data = "\ufeffone\r\ntwo ä\n".encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        import zstandard

        data = zstandard.ZstdCompressor().compress(data)
    (tmp_path / name).write_bytes(data)
    documents, _ = read(tmp_path / name)
    assert [(document.name, document.text) for document in documents] == [(name, "one\ntwo ä\n")]


@pytest.mark.parametrize("size", [99, 100, 101, 5000])
def test_a_large_text_file_is_pieces_that_end_with_lines(tmp_path, monkeypatch, size):
    monkeypatch.setattr(formats, "WHOLE_FILE", 100)
    monkeypatch.setattr(formats, "PIECE", 40)
    text = "".join(f"line {n} ä\n" for n in range(size))[: size - 3] + "äz"
    text = text if len(text.encode()) > 100 else "a" * size
    (tmp_path / "x.txt").write_text(text)
    documents, _ = read(tmp_path / "x.txt")
    assert "".join(document.text for document in documents) == text
    if len(text.encode()) <= 100:
        assert len(documents) == 1
    else:
        assert all(0 < len(document.text.encode()) <= 40 for document in documents)
        assert len({document.name for document in documents}) == len(documents) > 2
        assert "\n" not in text or all(document.text.endswith("\n") for document in documents[:-1])


def test_memory_does_not_grow_with_a_text_file(tmp_path):
    line = b"some words that fill a line of a large file, again and again, to its end\n"
    with (tmp_path / "x.txt").open("wb") as file:
        for _ in range(120):
            file.write(line * 7000)
    assert (tmp_path / "x.txt").stat().st_size > 60_000_000
    tracemalloc.start()
    size = sum(len(document.text) for document in read_file(tmp_path / "x.txt", "x", "text", "text", Reading()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == (tmp_path / "x.txt").stat().st_size
    assert peak < 60_000_000


def broken(name, cut):
    def make(path):
        WRITERS[name](path / name, [os.urandom(3000).hex() for _ in range(100)])
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * cut)] if cut else b"garbage, and no such file" * 9000)
        return name

    return make


def records(name, *values):
    """A file of JSONL or of ArrayRecord."""

    def make(path):
        if name == "x.jsonl":
            (path / name).write_bytes(b"\n".join(values) + b"\n")
        else:
            from array_record.python.array_record_module import ArrayRecordWriter

            writer = ArrayRecordWriter(str(path / name), "group_size:1")
            for value in values:
                writer.write(value)
            writer.close()
        return name

    return make


def columns(**values):
    def make(path):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(values), path / "x.parquet")
        return "x.parquet"

    return make


BAD = {
    "jsonl, no JSON": (records("x.jsonl", b'{"text": "a"}', b"{oops"), r"x\.jsonl' line 2 is not JSON \(Expecting"),
    "jsonl, no field": (records("x.jsonl", b'{"body": "a", "id": 1}'), r"line 1 has no text: got the fields 'body', 'id'; .*'text'"),
    "jsonl, a number": (records("x.jsonl", b'{"text": 3}'), r"line 1 has no text: got a int in it; expected an object with a string"),
    "jsonl, no UTF-8": (records("x.jsonl", b'{"text": "a"}', b'{"text": "\xff"}'), r"line 2 is not UTF-8 text \(byte 0xff"),
    "jsonl, too deep": (records("x.jsonl", b"[" * 100_000), r"line 1 is not JSON"),
    "gz, cut": (broken("x.jsonl.gz", 0.5), r"cannot read .*x\.jsonl\.gz': "),
    "gz, none": (broken("x.jsonl.gz", 0), r"cannot read .*x\.jsonl\.gz': Not a gzipped file"),
    "zst, cut": (broken("x.jsonl.zst", 0.7), r"cannot read .*x\.jsonl\.zst': it ends in the middle"),
    "zst, none": (broken("x.jsonl.zst", 0), r"cannot read .*x\.jsonl\.zst': it is no \.zst file"),
    "parquet, cut": (broken("x.parquet", 0.5), r"cannot read .*x\.parquet': .*Parquet"),
    "parquet, no column": (columns(a=[1], b=["x"]), r"x\.parquet' has no column 'text': got 'a', 'b'; name one"),
    "parquet, numbers": (columns(text=[1, 2]), r"has values of type int64 in the column 'text'; expected strings"),
    "parquet, null": (columns(text=["a", None]), r"row 2 has no text: got null"),
    "array_record, none": (broken("x.array_record", 0), r"cannot read .*x\.array_record': it is no ArrayRecord file"),
    "array_record, cut": (broken("x.array_record", 0.5), r"cannot read .*x\.array_record': it is no ArrayRecord file"),
    "array_record, no field": (records("x.array_record", b"fine", b'{"body": "a"}'), r"record 2 has no text: got the fields 'body'"),
    "array_record, no UTF-8": (records("x.array_record", b"\xff\xff"), r"record 1 is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_or_counted(tmp_path, case):
    make, message = BAD[case]
    name = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and "--data.skip-bad" in str(caught.value)
    _, reading = read(tmp_path / name, skip_bad=True)
    assert reading.bad == 1 and str(caught.value).startswith(str(reading.first_bad))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file that opens and cannot be read")
@pytest.mark.parametrize("text_format", ["text", "jsonl"])
def test_a_file_that_cannot_be_read_says_why(text_format):
    from pathlib import Path

    with pytest.raises(UserError, match=r"cannot read '/proc/self/mem': Input/output error"):
        list(read_file(Path("/proc/self/mem"), "mem", text_format, "text", Reading()))


@pytest.mark.parametrize("name, module", [("x.parquet", "pyarrow"), ("x.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'needs the package \'{module}\'; install it with: pip install "moejax\[data\]"'):
        read(tmp_path / name, skip_bad=True)


@pytest.mark.parametrize(
    "name, found",
    [
        ("a.TXT", "text"), ("b.jsonl.gz", "jsonl"), ("c.py.zst", "text"), ("d.parquet", "parquet"), ("e.arrayrecord", "array_record"),
        ("f.parquet.gz", None), ("g.bin", None), ("h", None), ("i.gz", None),
    ],
)  # fmt: skip
def test_names_say_formats(name, found):
    assert find_format(name) == found
