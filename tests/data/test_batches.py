"""Batches in the order of the curriculum: the same rows for any number of processes and any restart; epochs."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from moejax.config import DataConfig, Domain, Stage, UserError
from moejax.data import batches
from moejax.data.curriculum import Schedule

LENGTH = 4
SIZES = {"a": 300, "b": 120, "c": 60}


class NumberedRows:
    """Rows that say which they are, and nothing else: what the batches need of a domain."""

    def __init__(self, domain: int, size: int) -> None:
        self.domain, self.size = domain, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row):
        return {"tokens": np.full(LENGTH, 1000 * self.domain + row, np.int32), "weights": np.ones(LENGTH, np.float32)}


@pytest.fixture
def data():
    """Three stages; b is read in all, c not in the first; the boundaries lie inside a step of 8 rows."""
    stages = (
        Stage(53 * LENGTH, {"a": 0.8, "b": 0.2}),
        Stage(102 * LENGTH, {"a": 0.35, "b": 0.4, "c": 0.25}),
        Stage(50 * LENGTH, {"b": 1, "c": 2}),
    )
    return DataConfig(domains=tuple(Domain(name, "builtin:sql") for name in SIZES), stages=stages, sequence_length=LENGTH, seed=3)


@pytest.fixture
def rows():
    return {name: NumberedRows(number, size) for number, (name, size) in enumerate(SIZES.items())}


def read(data, rows, batch_size, start, stop, index=0, count=1):
    """The rows of steps [start, stop) of one process, one list a step."""
    iterator = batches.batches_from(data, rows, batch_size, start, index, count)
    return [batch["tokens"][:, 0].tolist() for batch in itertools.islice(iterator, stop - start)]


def test_a_batch_is_what_the_schedule_says(data, rows):
    schedule = Schedule(data)
    drawn = list(itertools.chain(*read(data, rows, 8, 0, 26)))
    assert [row // 1000 for row in drawn] == [schedule.locate(row)[0] for row in range(8 * 26)]
    assert {row // 1000 for row in drawn[:53]} == {0, 1} and {row // 1000 for row in drawn[155:]} == {1, 2}
    first = next(batches.batches_from(data, rows, 8))
    assert {name: (array.shape, array.dtype) for name, array in first.items()} == {
        "tokens": ((8, LENGTH), np.int32),
        "weights": ((8, LENGTH), np.float32),
    }


def test_no_row_comes_twice_before_its_domain_s_epoch_ends_across_stages(data, rows):
    drawn = list(itertools.chain(*read(data, rows, 8, 0, 100)))
    for number, size in enumerate(SIZES.values()):
        own = [row % 1000 for row in drawn if row // 1000 == number]
        epochs = [own[start : start + size] for start in range(0, len(own), size)]
        assert len(epochs) == {300: 1, 120: 3, 60: 8}[size]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert max(Counter(epochs[-1]).values()) == 1
        orders = [list(range(size)), *epochs[:-1]]
        assert all(one != two for one, two in itertools.combinations(orders, 2))  # every epoch in an order of its own


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_parts_of_all_processes_are_the_batch(data, rows, count):
    parts = [read(data, rows, 8, 0, 25, index, count) for index in range(count)]
    joined = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert joined == read(data, rows, 8, 0, 25)


@pytest.mark.parametrize("start", [0, 1, 6, 7, 19, 24])
def test_a_restart_reads_on_where_the_run_stopped(data, rows, start):
    """Steps 6 and 19 (from 0) hold the stage boundaries, rows 53 and 155."""
    assert read(data, rows, 8, start, 25) == read(data, rows, 8, 0, 25)[start:]


def test_restarts_with_other_numbers_of_processes_read_the_same_rows(data, rows):
    drawn = []
    for count, start, stop in ((1, 0, 5), (2, 5, 6), (4, 6, 7), (8, 7, 19), (2, 19, 20), (1, 20, 25)):
        parts = [read(data, rows, 8, start, stop, index, count) for index in range(count)]
        drawn += [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert drawn == read(data, rows, 8, 0, 25)


def test_the_seed_decides_the_order_and_another_domain_does_not(data, rows):
    import dataclasses

    other = read(dataclasses.replace(data, seed=4), rows, 8, 0, 5)
    assert other != read(data, rows, 8, 0, 5)
    alone = dataclasses.replace(data, stages=(Stage(None, {"b": 1}),))
    drawn = list(itertools.chain(*read(data, rows, 8, 0, 20)))
    own = [row for row in drawn if row // 1000 == 1]
    assert list(itertools.chain(*read(alone, {"b": rows["b"]}, 1, 0, len(own)))) == own


def test_a_step_far_ahead_is_read_at_once(data, rows):
    dataset = batches.make_dataset(data, rows, 8)
    assert next(batches.batches_from(data, rows, 8, 10**12))["tokens"].tolist() == dataset[10**12]["tokens"].tolist()


def test_a_closed_iterator_leaves_no_thread(data, rows):
    before = set(threading.enumerate())
    iterator = batches.batches_from(data, rows, 8)
    next(iterator)
    reading = set(threading.enumerate()) - before
    assert reading
    iterator.close()
    for thread in reading:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_program_that_ends_while_it_reads_ahead_ends_quietly():
    code = (
        "from moejax.config import DataConfig, Domain, Stage\n"
        "from moejax.data.batches import batches_from\n"
        "from tests.data.test_batches import NumberedRows\n"
        "data = DataConfig(domains=(Domain('a', 'builtin:sql'),), sequence_length=4)\n"
        "iterator = batches_from(data, {'a': NumberedRows(0, 9)}, 8)\n"
        "print(next(iterator)['tokens'].shape)\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "(8, 4)\n", "")


def test_what_cannot_be_read_is_one_message(data, rows):
    with pytest.raises(UserError, match=r"batch_size=8 cannot be shared by 3 processes; .* 1, 2, 4, 8 processes"):
        batches.batches_from(data, rows, 8, 0, 0, 3)
    with pytest.raises(UserError, match=r"'c' .* has a weight in the stages but no rows"):
        batches.batches_from(data, {**rows, "c": NumberedRows(2, 0)}, 8)
    without = DataConfig(domains=data.domains, stages=data.stages[:1], sequence_length=LENGTH)
    assert next(batches.batches_from(without, {**rows, "c": NumberedRows(2, 0)}, 8))["tokens"].shape == (8, LENGTH)
