"""Rows -> batches, in the order of the curriculum: the batch of a step is a pure function of the configuration and the step.

Each domain's rows are shuffled anew every epoch, by grain; the schedule says which domain's next row stands at which place. So the whole
state of the data is one integer, the step, and every process reads its part of a batch whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

from moejax.config import DataConfig, UserError, divisors
from moejax.data.curriculum import Schedule, require_rows
from moejax.data.documents import stable_key

PREFETCH_THREADS = 2  # more of them only wait for each other: making a row holds the interpreter
PREFETCHED_BATCHES = 4
_ENDLESS = 2**62


class RowSource(Protocol):
    """The rows of a domain by number: each a Batch of [T]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class _Part:
    """The rows of one process, in the order it reads them: its part of step 0's batch, of step 1's, and so on."""

    def __init__(self, schedule: Schedule, members: list[Any], batch_size: int, process_index: int, process_count: int) -> None:
        self.schedule, self.members, self.batch_size = schedule, members, batch_size
        self.size = batch_size // process_count
        self.offset = process_index * self.size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: Any) -> Any:
        step, place = divmod(index, self.size)
        domain, ordinal = self.schedule.locate(step * self.batch_size + self.offset + place)
        return self.members[domain][ordinal]


def make_dataset(data: DataConfig, rows: Mapping[str, RowSource], batch_size: int, process_index: int = 0, process_count: int = 1) -> Any:
    """The endless grain.MapDataset of batches: item k is this process's part of the Batch of step k (from 0), whatever was read before.

    The part is rows [i * b, (i + 1) * b) of the batch, i the process and b = batch_size / process_count. `rows` has an entry for each
    domain with a weight. Raises UserError for one without rows, and where the processes cannot share a batch evenly.
    """
    import grain

    if batch_size % process_count:
        raise UserError(
            f"train.batch_size={batch_size} cannot be shared by {process_count} processes; set --train.batch-size to a multiple of "
            f"{process_count}, or use {', '.join(map(str, divisors(batch_size)))} processes"
        )
    weighted = {name for stage in data.curriculum for name in stage.weights}
    require_rows(data, {name: len(rows[name]) for name in weighted})
    members: list[Any] = []
    for domain in data.sources:
        # No domain's order depends on another's presence: its seed is its own.
        seed = stable_key(domain.name, data.seed) % 2**32
        source = cast(Any, rows[domain.name]) if domain.name in weighted else None
        members.append(None if source is None else grain.MapDataset.source(source).shuffle(seed=seed).repeat())
    part = _Part(Schedule(data), members, batch_size, process_index, process_count)
    return grain.MapDataset.source(part).batch(part.size)


def batches_from(
    data: DataConfig,
    rows: Mapping[str, RowSource],
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Any]:
    """The batches (a process's parts of them) of steps start_step, start_step + 1, ... without end, read ahead in the background.

    Raises UserError as `make_dataset` does, at once. Closing the iterator, or dropping it, ends the reading.
    """
    dataset = make_dataset(data, rows, batch_size, process_index, process_count)
    return _read_ahead(dataset, start_step)


def _read_ahead(dataset: Any, start_step: int) -> Iterator[Any]:
    import grain

    options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    try:
        yield from iterator
    finally:
        iterator.close()
