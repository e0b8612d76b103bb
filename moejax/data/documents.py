"""A document, what decides its place, and what reading documents met on its way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from moejax.config import UserError


@dataclass(frozen=True)
class Document:
    """One whole text (a module, a file, a line of a JSONL file); `name` is unique in its domain and stable between runs."""

    name: str
    text: str


@dataclass
class Reading:
    """What reading a domain met: how far it is, and what was left out. `skip_bad` says whether bad text stops it or is counted."""

    skip_bad: bool = False
    total: int = 0  # bytes of the source, compressed ones where it is
    before: int = 0  # of them, in the files that were read to their end
    consumed: int = 0  # of them, in all
    empty: int = 0  # documents without a word
    bad: int = 0  # files, lines and records that could not be used
    first_bad: str | None = None

    def follow(self, position: int) -> None:
        """The file being read has been read up to this byte."""
        self.consumed = self.before + position

    def finish_file(self, size: int) -> None:
        """A file of this size has been read to its end."""
        self.before += size
        self.consumed = self.before

    def refuse(self, message: str) -> None:
        """Raises UserError with the message, or counts it where bad text is left out."""
        if not self.skip_bad:
            raise UserError(f"{message}; or leave such out, counted, with --data.skip-bad")
        self.bad += 1
        self.first_bad = self.first_bad or message


def stable_key(name: str, seed: int) -> int:
    """A 64-bit number that depends on the name and the seed alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def cut_bytes(data: bytes, size: int) -> bytes:
    """At most `size` bytes of UTF-8 data, up to the end of a line where there is one, else up to the end of a character."""
    newline = data.rfind(b"\n", 0, size)
    if newline >= 0:
        return data[: newline + 1]
    while size > 0 and data[size] & 0xC0 == 0x80:
        size -= 1
    return data[:size]
