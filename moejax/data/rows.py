"""A stream of documents' ids as rows of fixed length: what a training batch is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.config import UserError


class Batch(NamedTuple):
    """Packed rows, all [B, T] (a single row: [T]); a pytree.

    tokens: int32 ids read. targets: int32, the id after each. weights: float32, 1 where the target counts, 0 at a document's
    last token and on padding. segments: int32, the documents of a row numbered from 1, 0 is padding. positions: int32, from 0
    in each segment; a document cut at a row's end is a new segment in the next row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Rows:
    """A stream of documents' ids as rows of `sequence_length` positions, row by number; full but for the last.

    Neighbouring rows share one id, a target in the first and an input in the second, so that no target is lost at a cut. A row is
    cut out of the stream when it is asked for: the arrays may be maps of files of any size, of which only the row is read.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, sequence_length: int):
        """ids: the documents' ids one after another; offsets: where each begins, int64 [documents + 1], the end of the last included.

        Raises UserError below two ids.
        """
        # A plain view of a memory map: slices of np.memmap itself cost microseconds each.
        self.ids, self.offsets = np.asarray(ids), np.asarray(offsets)
        self.num_tokens = len(ids)
        if self.num_tokens < 2:
            raise UserError("the documents of a domain have fewer than two tokens; nothing can be predicted, add text")
        self.sequence_length = sequence_length
        self._length = -(-(self.num_tokens - 1) // sequence_length)
        self._index = np.arange(sequence_length, dtype=np.int32)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: Any) -> Batch:
        """Row `row` as a Batch of [T]; raises IndexError beyond the last."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        length, begin = self.sequence_length, int(row) * self.sequence_length
        ids = np.zeros(length + 1, np.int32)
        part = self.ids[begin : begin + length + 1]
        ids[: len(part)] = part
        # Ends of documents within the row: the token before one has no target, the token at one begins a segment.
        first_end = np.searchsorted(self.offsets, begin, side="right")
        after = np.searchsorted(self.offsets, begin + length, side="right")
        ends = self.offsets[first_end:after] - begin
        weights = np.ones(length, np.float32)
        weights[ends - 1] = 0
        starts = np.zeros(length, np.int32)
        starts[0] = 1
        starts[ends[ends < length]] = 1
        segments = np.cumsum(starts, dtype=np.int32)
        positions = self._index - np.flatnonzero(starts).astype(np.int32)[segments - 1]
        if len(part) <= length:
            weights[len(part) :] = segments[len(part) :] = positions[len(part) :] = 0
        return Batch(ids[:-1], ids[1:], weights, segments, positions)


def pack(documents: Sequence[Sequence[int]], sequence_length: int) -> Rows:
    """Rows of documents given as lists of ids."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return Rows(np.concatenate([np.asarray(ids, np.int32) for ids in documents]), offsets, sequence_length)
