"""The curriculum: which row of which domain is read at which place of the whole training, as a pure function.

Rows are numbered from 0 over all stages. Domain i's quota after k rows is the sum over stages of rows times normalised weight, and its
count stays within one row of it (strictly) after every k, across stages too. That is a schedule of unit jobs on one machine: the domain's
m-th row may be read no sooner than its quota passes m - 1, and must be read by the time it reaches m. Sharing every row out by the
weights keeps all those windows with fractions of rows, so whole rows can keep them as well (the matching polytope is integral), and
earliest deadline first does: no rule does better for unit jobs on one machine (Jackson 1955).

All arithmetic is exact, in integers scaled by one denominator. In a long stage the windows repeat, and so, soon, does the whole state:
the schedule of one cycle is kept and counted through, only the rows before the stage's end are scheduled one by one again.
"""

from __future__ import annotations

import bisect
import heapq
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from moejax.config import DataConfig, UserError

SIMULATED_ROWS = 200_000  # a stage of no more rows is scheduled row by row
LARGEST_PERIOD = 65_536  # the largest common denominator of a longer stage's weights; larger ones are rounded to it


def normalise_weights(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as exact fractions of their sum, each taken for the decimal number it is written as: 0.1 is a tenth."""
    exact = {name: Fraction(str(float(weight))) for name, weight in weights.items()}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


def round_weights(weights: Mapping[str, Fraction], denominator: int) -> dict[str, Fraction]:
    """Weights of sum 1 as multiples of 1/denominator, none of them 0, of sum 1 again: the largest takes up what rounding leaves."""
    parts = {name: max(round(weight * denominator), 1) for name, weight in weights.items()}
    parts[max(parts, key=parts.__getitem__)] += denominator - sum(parts.values())
    return {name: Fraction(part, denominator) for name, part in parts.items()}


def find_boundaries(data: DataConfig) -> tuple[int, ...]:
    """The row at which each stage begins: the tokens of the stages before it, in rows, rounded to the nearest."""
    boundaries, tokens = [0], 0
    for stage in data.curriculum[:-1]:
        assert stage.tokens is not None  # only the last may leave them open
        tokens += stage.tokens
        boundaries.append(round(Fraction(tokens, data.sequence_length)))
    return tuple(boundaries)


@dataclass(frozen=True)
class _Part:
    """Rows from `start` on with one mixture: a stage, or a piece of one."""

    start: int
    weights: Mapping[str, Fraction]


@dataclass(frozen=True)
class _Segment:
    """Scheduled rows [start, stop); a table of domains that is repeated until the segment's end."""

    start: int
    stop: float  # inf: the last one
    table: np.ndarray  # [P] domain of each row of a cycle
    ordinals: np.ndarray  # [P] rows of that domain earlier in the cycle
    counts: list[int]  # rows of each domain before the segment
    counts_per_cycle: list[int]


class Schedule:
    """Row -> (domain, how many rows of that domain came before), for any row, of the curriculum of a DataConfig.

    Nothing is scheduled before it is asked for. Safe to use from several threads.
    """

    def __init__(self, data: DataConfig, simulated_rows: int = SIMULATED_ROWS, largest_period: int = LARGEST_PERIOD) -> None:
        self.names = tuple(domain.name for domain in data.sources)
        self.stage_starts = find_boundaries(data)
        self.rounded: list[tuple[int, int]] = []  # (stage from 0, row) from where weights too fine for so many rows are rounded
        self._simulated_rows = simulated_rows
        parts = self._divide(data, largest_period)
        self._starts = [part.start for part in parts]
        # One denominator for all quotas: quota times it is a whole number at every row.
        self._scale = math.lcm(*(weight.denominator for part in parts for weight in part.weights.values()))
        self._steps = [[int(part.weights.get(name, Fraction(0)) * self._scale) for name in self.names] for part in parts]
        self._quotas = [[0] * len(self.names)]  # of each domain where each part begins, scaled
        for number in range(1, len(parts)):
            rows = self._starts[number] - self._starts[number - 1]
            earlier = zip(self._quotas[-1], self._steps[number - 1], strict=True)
            self._quotas.append([quota + rows * step for quota, step in earlier])
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._segment_starts: list[int] = []
        self._scheduled_parts = 0
        self._scheduled_to: float = 0
        self._counts = [0] * len(self.names)  # where the scheduled rows end

    def locate(self, row: int) -> tuple[int, int]:
        """(domain's number in `names`, its rows before this one) of a row, in microseconds once its stage is scheduled."""
        segment = self._find_segment(row)
        cycle, place = divmod(row - segment.start, len(segment.table))
        domain = int(segment.table[place])
        return domain, segment.counts[domain] + cycle * segment.counts_per_cycle[domain] + int(segment.ordinals[place])

    def counts(self, rows: int) -> list[int]:
        """Rows of each domain among the first `rows`."""
        segment = self._find_segment(rows)
        cycle, place = divmod(rows - segment.start, len(segment.table))
        in_cycle = np.bincount(segment.table[:place], minlength=len(self.names)).tolist()
        return [sum(parts) for parts in zip(segment.counts, (cycle * count for count in segment.counts_per_cycle), in_cycle, strict=True)]

    def find(self, domain: int, ordinal: int, stop: int) -> int | None:
        """The row at which a domain is read after `ordinal` rows of it; None where that is not before row `stop`."""
        if self.counts(stop)[domain] <= ordinal:
            return None
        return bisect.bisect_left(range(stop), ordinal + 1, key=lambda row: self.counts(row + 1)[domain])

    def _divide(self, data: DataConfig, largest_period: int) -> list[_Part]:
        """The stages as parts; weights with a denominator too large for a cycle to be kept are rounded in long ones."""
        parts = []
        stops = [*self.stage_starts[1:], None]
        for number, (stage, start, stop) in enumerate(zip(data.curriculum, self.stage_starts, stops, strict=True)):
            weights = normalise_weights(stage.weights)
            if math.lcm(*(weight.denominator for weight in weights.values())) > largest_period:
                if stop is None and stage.tokens is not None:
                    stop = start + round(Fraction(stage.tokens, data.sequence_length))
                    if stop - start <= self._simulated_rows:  # exact as far as its own tokens go
                        parts.append(_Part(start, weights))
                        start = stop
                        stop = None
                if stop is None or stop - start > self._simulated_rows:
                    weights = round_weights(weights, largest_period)
                    self.rounded.append((number, start))
            parts.append(_Part(start, weights))
        stops = [*(part.start for part in parts[1:]), math.inf]
        return [part for part, stop in zip(parts, stops, strict=True) if part.start < stop]

    def _find_segment(self, row: int) -> _Segment:
        if row < 0:
            raise IndexError(f"row {row}; rows count from 0")
        if row >= self._scheduled_to:
            with self._lock:
                while row >= self._scheduled_to:
                    self._schedule_part(self._scheduled_parts)
        return self._segments[bisect.bisect_right(self._segment_starts, row) - 1]

    def _schedule_part(self, part: int) -> None:
        """Appends the segments of a part: row by row where it is short, else up to a cycle, the cycle, and the rows after it."""
        start = self._starts[part]
        stop = self._starts[part + 1] if part + 1 < len(self._starts) else math.inf
        if stop - start <= self._simulated_rows:
            self._append(start, stop, self._simulate(part, start, int(stop)))
        else:
            period = math.lcm(*(self._scale // math.gcd(self._scale, step) for step in self._steps[part] if step))
            row = self._schedule_cycles(part, start, stop, period)
            if row < stop:
                self._append(int(row), stop, self._simulate(part, int(row), int(stop)))
        self._scheduled_parts += 1
        self._scheduled_to = stop

    def _schedule_cycles(self, part: int, start: int, stop: float, period: int) -> float:
        """Appends the segments that come before the rows whose deadlines look over the part's end; returns their end.

        Where a period begins, the state is how far each count is from its quota, and a count can only be one of two numbers: a state
        comes back, and from then on the schedule repeats.
        """
        tables: list[np.ndarray] = []
        states: dict[tuple[int, ...], int] = {}
        per_period = [period * step // self._scale for step in self._steps[part]]
        counts = list(self._counts)
        last = stop - 2 * period  # a window is a period long at most
        while True:
            row = start + len(tables) * period
            state = tuple(count - len(tables) * each for count, each in zip(counts, per_period, strict=True))
            if state in states or row + period > last:
                break
            states[state] = len(tables)
            tables.append(self._simulate(part, row, row + period, counts))
        first = states.get(state, len(tables))
        if first:
            self._append(start, start + first * period, np.concatenate(tables[:first]))
        if first == len(tables):
            return row
        cycle = np.concatenate(tables[first:])
        begin = start + first * period
        end = stop if stop == math.inf else begin + int(last - begin) // len(cycle) * len(cycle)
        self._append(begin, end, cycle)
        return end

    def _append(self, start: int, stop: float, table: np.ndarray) -> None:
        """A segment that repeats the table from row `start` to row `stop`, a whole number of times."""
        per_cycle = np.bincount(table, minlength=len(self.names)).tolist()
        ordinals = np.empty(len(table), np.int32)
        for domain, count in enumerate(per_cycle):
            ordinals[table == domain] = np.arange(count)
        self._segments.append(_Segment(start, stop, table, ordinals, self._counts, per_cycle))
        if stop < math.inf:
            cycles = (int(stop) - start) // len(table)
            self._counts = [count + cycles * each for count, each in zip(self._counts, per_cycle, strict=True)]
        self._segment_starts.append(start)

    def _simulate(self, part: int, start: int, stop: int, counts: list[int] | None = None) -> np.ndarray:
        """The domains of rows [start, stop) of a part by earliest deadline first; `counts` are those at `start`, and are brought on."""
        counts = list(self._counts) if counts is None else counts
        waiting = [(self._find_release(part, domain, count), domain) for domain, count in enumerate(counts)]
        heapq.heapify(waiting)
        ready: list[tuple[float, int]] = []
        table = np.empty(stop - start, np.int16)
        for row in range(start, stop):
            while waiting and waiting[0][0] <= row + 1:
                domain = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (self._find_deadline(part, domain, counts[domain]), domain))
            domain = heapq.heappop(ready)[1]
            table[row - start] = domain
            counts[domain] += 1
            heapq.heappush(waiting, (self._find_release(part, domain, counts[domain]), domain))
        return table

    def _find_release(self, part: int, domain: int, count: int) -> float:
        """The first number of rows after which `count` + 1 of the domain is less than one above its quota."""
        return self._find_quota(part, domain, count * self._scale + 1)

    def _find_deadline(self, part: int, domain: int, count: int) -> float:
        """The first number of rows after which `count` of the domain is one below its quota."""
        return self._find_quota(part, domain, (count + 1) * self._scale)

    def _find_quota(self, part: int, domain: int, level: int) -> float:
        """The first number of rows, from the part's start on, at which the domain's scaled quota has reached `level`; inf: never."""
        for number in range(part, len(self._starts)):
            lacking = level - self._quotas[number][domain]
            if lacking <= 0:
                return self._starts[number]
            step = self._steps[number][domain]
            if step and (number + 1 == len(self._starts) or self._quotas[number + 1][domain] >= level):
                return self._starts[number] - (-lacking // step)
        return math.inf


def require_rows(data: DataConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError for the first domain that has a weight in a stage and no rows."""
    weighted = {name for stage in data.curriculum for name in stage.weights}
    for domain in data.sources:
        if domain.name in weighted and not sizes[domain.name]:
            raise UserError(
                f"data domain {domain.name!r} ({domain.path}) has a weight in the stages but no rows; add text to it, or take it out of "
                "data.stages"
            )


@dataclass(frozen=True)
class Usage:
    """What a run reads of one domain."""

    domain: str
    rows: int  # that there are
    rows_read: int  # repeated ones included
    exhausted_at: int | None  # the step, from 1, that reads the first row again; None: none is read twice

    @property
    def epochs(self) -> float:
        """How often the domain is read; 0 for one without rows that is not read."""
        return self.rows_read / self.rows if self.rows_read else 0.0


def measure_usage(schedule: Schedule, sizes: Mapping[str, int], batch_size: int, steps: int) -> list[Usage]:
    """What a run of `steps` steps reads of each domain that has `sizes` rows, in the order of the config."""
    stop = batch_size * steps
    usages = []
    for number, (name, count) in enumerate(zip(schedule.names, schedule.counts(stop), strict=True)):
        row = schedule.find(number, sizes[name], stop) if name in sizes else None
        usages.append(Usage(name, sizes.get(name, 0), count, None if row is None else row // batch_size + 1))
    return usages


def describe_repeats(data: DataConfig, sizes: Mapping[str, int], batch_size: int, steps: int) -> list[str]:
    """A line for each domain that the run reads more than once. Raises UserError as `require_rows` does."""
    require_rows(data, sizes)
    return [
        f"domain {usage.domain}: its {usage.rows:,} rows last to step {usage.exhausted_at:,} of {steps:,}; it is read "
        f"{usage.epochs:.1f} times"
        for usage in measure_usage(Schedule(data), sizes, batch_size, steps)
        if usage.exhausted_at is not None
    ]
