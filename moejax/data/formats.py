"""The documents of one file: plain text, JSONL (either also .gz or .zst), Parquet, ArrayRecord. Memory is that of a few documents.

A new format is one reader and one line in `READERS` and in `SUFFIXES`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from moejax.config import UserError
from moejax.data.documents import Document, Reading, cut_bytes

TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".py", ".sql", ".tex", ".html", ".c", ".h", ".cc", ".cpp", ".cs", ".cu", ".go", ".java", ".jl", ".js", ".php",
    ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".swift", ".ts",
)  # fmt: skip
SUFFIXES = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"), ".jsonl": "jsonl", ".parquet": "parquet", ".array_record": "array_record",
    ".arrayrecord": "array_record",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
KNOWN_FILES = f"{', '.join(TEXT_SUFFIXES[:5])} and other text, .jsonl (either also .gz or .zst), .parquet or .array_record files"

WHOLE_FILE = 16_000_000  # bytes; a text file above it is many documents
PIECE = 500_000  # bytes of one of those
_ROWS_AT_ONCE = 64

Reader = Callable[[Path, str, str, Reading], Iterator[Document]]


def find_format(name: str) -> str | None:
    """The format that a file's name says, None for one that says none."""
    path = Path(name.lower())
    is_compressed = path.suffix in COMPRESSIONS
    found = SUFFIXES.get(path.with_suffix("").suffix if is_compressed else path.suffix)
    return None if is_compressed and found not in ("text", "jsonl") else found


def read_file(path: Path, name: str, text_format: str, text_field: str, reading: Reading) -> Iterator[Document]:
    """The documents of a file in its order, empty ones too; `name` is what their names begin with.

    A text file is a document, and one above WHOLE_FILE bytes a series of pieces cut at line ends. Raises UserError, naming file
    and line, for what is no such file or has no text, or counts it in `reading` and goes on behind it.
    """
    try:
        yield from READERS[text_format](path, name, text_field, reading)
    except (OSError, EOFError, zlib.error) as error:  # gzip's among them
        reading.refuse(f"cannot read {str(path)!r}: {_reason(error)}; fix its permissions, or restore it")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the bytes of a file, decompressed; the file itself, which knows how far it was read)."""
    with path.open("rb") as file:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.open(file) as stream:
                yield cast(IO[bytes], stream), file
        elif suffix == ".zst":
            with io.BufferedReader(_ZstdStream(file), 1 << 20) as stream:
                yield stream, file
        else:
            yield file, file


class _ZstdStream(io.RawIOBase):
    """A .zst file decompressed, of one frame or more. Raises EOFError where it ends within one: the library's reader is silent then."""

    def __init__(self, file: IO[bytes]):
        self._file, self._frame, self._ready = file, None, b""
        self._library = import_extra("zstandard", "a .zst file")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = getattr(self._frame, "unused_data", b"") or self._file.read(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle, as a download that was cut off does")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise OSError(f"it is no .zst file ({error})") from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def import_extra(module: str, what: str, install: str = '"moejax[data]"') -> Any:
    """A module that only some formats need. Raises UserError, saying what to install, where it is missing."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"reading {what} needs the package {package!r}; install it with: pip install {install}") from error


def _decode(data: bytes, where: str, reading: Reading, offset: int = 0) -> str | None:
    """The text of UTF-8 bytes; None, refused, for others. `offset` is where they begin in their file."""
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        reading.refuse(f"{where} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {offset + error.start}); convert it to UTF-8")
        return None


def _read_text(path: Path, name: str, text_field: str, reading: Reading) -> Iterator[Document]:
    with _open(path) as (stream, file):
        data = stream.read(WHOLE_FILE + 1)
        reading.follow(file.tell())
        if len(data) <= WHOLE_FILE:
            text = _decode(data, repr(str(path)), reading)
            if text is not None:
                yield Document(name, text.replace("\r\n", "\n"))
            return
        number, offset = 0, 0
        while data:
            following = stream.read(WHOLE_FILE)
            reading.follow(file.tell())
            start = 0
            # What is left behind the last whole piece goes before the bytes that follow.
            while len(data) - start > PIECE or (start < len(data) and not following):
                piece = data[start : start + PIECE + 1]
                piece = cut_bytes(piece, PIECE) if len(piece) > PIECE else piece
                number += 1
                text = _decode(piece, repr(str(path)), reading, offset + start)
                if text is not None:
                    yield Document(f"{name}:{number}", text.replace("\r\n", "\n"))
                start += len(piece)
            offset += start
            data = data[start:] + following


def _read_json_lines(path: Path, name: str, text_field: str, reading: Reading) -> Iterator[Document]:
    with _open(path) as (stream, file):
        for number, line in enumerate(stream, start=1):
            if number % 64 == 0:
                reading.follow(file.tell())
            if not line.strip():
                continue
            text = _read_record(line, f"{str(path)!r} line {number}", text_field, reading)
            if text is not None:
                yield Document(f"{name}:{number}", text)


def _read_record(data: bytes, where: str, text_field: str, reading: Reading) -> str | None:
    """The text of a JSON object; None, refused, for what has none."""
    decoded = _decode(data, where, reading)
    if decoded is None:
        return None
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        reading.refuse(f'{where} is not JSON ({reason}); expected one object a line, like {{"{text_field}": "..."}}')
        return None
    return _take_text(record, where, text_field, reading)


def _take_text(record: Any, where: str, text_field: str, reading: Reading) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        got = f"the fields {', '.join(map(repr, record)) or 'none'}" if isinstance(record, dict) else f"a {type(record).__name__}"
        if isinstance(record, dict) and text_field in record:
            got = f"a {type(record[text_field]).__name__} in it"
        reading.refuse(
            f"{where} has no text: got {got}; expected an object with a string in the field {text_field!r} (the domain's text_field)"
        )
        return None
    text = record[text_field]
    try:
        text.encode()
    except UnicodeEncodeError:
        reading.refuse(f"{where} has half a surrogate pair in its text, which is no character; write the character itself")
        return None
    return text


def _read_parquet(path: Path, name: str, text_field: str, reading: Reading) -> Iterator[Document]:
    import_extra("pyarrow", "a Parquet file")
    import pyarrow
    from pyarrow import parquet

    where = repr(str(path))
    try:
        # Without pre_buffer, and through a buffer, a row group is read page by page and never held whole.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = file.schema_arrow
            if text_field not in columns.names:
                reading.refuse(
                    f"{where} has no column {text_field!r}: got {', '.join(map(repr, columns.names)) or 'none'}; name one of them as the "
                    "domain's text_field"
                )
                return
            row, rows, size = 0, max(file.metadata.num_rows, 1), path.stat().st_size
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[text_field], use_threads=False):
                column = batch.column(0)
                column = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
                if not any(check(column.type) for check in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
                    reading.refuse(f"{where} has values of type {column.type} in the column {text_field!r}; expected strings")
                    return
                for value in column.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if value is None:
                        reading.refuse(f"{where} row {row} has no text: got null in the column {text_field!r}; expected a string")
                        continue
                    text = _decode(value, f"{where} row {row}", reading)
                    if text is not None:
                        yield Document(f"{name}:{row}", text)
                reading.follow(size * row // rows)
    except pyarrow.ArrowException as error:
        reading.refuse(f"cannot read {where}: {_reason(error)}; restore it")


def _read_array_record(path: Path, name: str, text_field: str, reading: Reading) -> Iterator[Document]:
    # It comes with grain, where there are wheels of it.
    array_record_module = import_extra("array_record.python.array_record_module", "an ArrayRecord file", "array_record")
    size = path.stat().st_size
    with path.open("rb"):
        pass  # a file that may not be opened says so itself, with the system's reason
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        if not reader.ok() or (not count and size):
            reading.refuse(f"cannot read {str(path)!r}: it is no ArrayRecord file, or a part of one; restore it")
            return
        for start in range(0, count, _ROWS_AT_ONCE):
            for number, record in enumerate(reader.read(start, min(start + _ROWS_AT_ONCE, count)), start=start + 1):
                where = f"{str(path)!r} record {number}"
                is_object = record.lstrip()[:1] == b"{" and _is_json(record)
                text = _read_record(record, where, text_field, reading) if is_object else _decode(record, where, reading)
                if text is not None:
                    yield Document(f"{name}:{number}", text)
            reading.follow(size * start // max(count, 1))
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        reading.refuse(f"cannot read {str(path)!r}: {_reason(error)}; restore it")
    finally:
        with contextlib.suppress(RuntimeError):  # of a broken file it says so again
            reader.close()


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


READERS: dict[str, Reader] = {
    "text": _read_text,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
}
