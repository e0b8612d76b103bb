"""The curriculum's schedule: exact at every prefix, across stages, wherever it is asked; and what a run reads of each domain."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

import pytest

from moejax.config import DataConfig, Domain, Stage, UserError
from moejax.data import curriculum
from moejax.data.curriculum import Schedule

LENGTH = 8


def make_data(stages: list[tuple[int | None, dict[str, float]]], length: int = LENGTH) -> DataConfig:
    """A curriculum from (tokens, weights) of each stage."""
    names = sorted({name for _, weights in stages for name in weights})
    domains = tuple(Domain(name, "builtin:sql") for name in names)
    return DataConfig(domains=domains, stages=tuple(Stage(*stage) for stage in stages), sequence_length=length)


def draw_data(seed: int, most_rows: int = 300) -> DataConfig:
    """A random curriculum: 3 to 6 domains, some absent from some stages, skewed weights, stages that are multiples of nothing."""
    rng = random.Random(seed)
    names = "abcdef"[: rng.randint(3, 6)]
    stages = []
    for _ in range(rng.randint(1, 5)):
        present = rng.sample(names, rng.randint(1, len(names)))
        kinds = [lambda: float(rng.randint(1, 12)), lambda: round(rng.random() ** 4 + 0.001, 3), lambda: rng.expovariate(1) + 1e-9]
        draw = rng.choice(kinds)
        stages.append((rng.randint(1, most_rows * LENGTH), {name: draw() for name in present}))
    return make_data([*stages, (None, {name: rng.randint(1, 9) for name in names})])


def compute_quotas(data: DataConfig, rows: int) -> list[list[Fraction]]:
    """Each domain's quota after 0, 1, ... rows: rows times normalised weight, added up; a second, plain way to it."""
    quotas = [[Fraction(0)] * len(data.sources)]
    starts = list(curriculum.find_boundaries(data))
    for row in range(rows):
        stage = data.curriculum[max(number for number, start in enumerate(starts) if start <= row)]
        total = sum(Fraction(str(weight)) for weight in stage.weights.values())
        weights = [Fraction(str(stage.weights.get(domain.name, 0.0))) / total for domain in data.sources]
        quotas.append([quota + weight for quota, weight in zip(quotas[-1], weights, strict=True)])
    return quotas


def read_all(schedule: Schedule, rows: int) -> list[tuple[int, int]]:
    return [schedule.locate(row) for row in range(rows)]


@pytest.mark.parametrize("seed", range(15))
def test_every_prefix_keeps_every_quota_across_stages(seed):
    data = draw_data(seed)
    schedule = Schedule(data)
    rows = schedule.stage_starts[-1] + 200
    counts = [0] * len(data.sources)
    for row, quotas in enumerate(compute_quotas(data, rows)):
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True)), (row, counts, quotas)
        assert schedule.counts(row) == counts
        domain, ordinal = schedule.locate(row)
        assert ordinal == counts[domain]
        counts[domain] += 1


@pytest.mark.parametrize("seed", range(15))
def test_a_long_stage_s_cycles_are_what_reading_row_by_row_gives(seed):
    rng = random.Random(seed)
    stages = []
    for number in range(rng.randint(2, 4)):
        present = rng.sample("abcd", rng.randint(1, 4))
        stages.append((rng.randint(800, 3000) * LENGTH + number, {name: rng.choice([1, 2, 3, 5, 7, 10, 25]) for name in present}))
    data = make_data([*stages, (None, {"a": 1, "b": 2, "c": 4, "d": 0.5})])
    plain, jumping = Schedule(data, simulated_rows=10**6), Schedule(data, simulated_rows=50)
    rows = plain.stage_starts[-1] + 300
    # Both orders of asking, from the last row to the first and as it comes, make no difference.
    assert [jumping.locate(row) for row in range(rows - 1, -1, -1)][::-1] == read_all(plain, rows)
    kept = sum(len(segment.table) for segment in jumping._segments)
    assert kept < rows / 2 and not jumping.rounded
    shuffled = rng.sample(range(rows), 200)
    assert [Schedule(data, simulated_rows=50).locate(row) for row in shuffled[:5]] == [plain.locate(row) for row in shuffled[:5]]
    assert [jumping.counts(row) for row in shuffled] == [plain.counts(row) for row in shuffled]


@pytest.mark.parametrize("seed", range(4))
def test_long_stages_with_weights_too_fine_are_rounded_and_stay_exact(seed):
    rng = random.Random(seed)
    weights = [{name: rng.random() ** 3 + 1e-7 for name in "abcd"} for _ in range(3)]
    data = make_data([(1500 * LENGTH, weights[0]), (100 * LENGTH, weights[1]), (1700 * LENGTH, weights[2])])
    schedule = Schedule(data, simulated_rows=200, largest_period=64)
    assert schedule.rounded == [(0, 0), (2, 1600)]
    rounded = [
        {name: float(w) for name, w in curriculum.round_weights(curriculum.normalise_weights(stage), 64).items()} for stage in weights
    ]
    assert all(weight * 64 == int(weight * 64) >= 1 for stage in rounded for weight in stage.values())
    stages = tuple(
        dataclasses.replace(stage, weights=rounded[number] if number != 1 else weights[1]) for number, stage in enumerate(data.stages)
    )
    assert all(sum(stage.values()) == 1 for stage in rounded)
    same = Schedule(dataclasses.replace(data, stages=stages), simulated_rows=200, largest_period=64)
    assert read_all(same, 4000) == read_all(schedule, 4000)
    for quotas, row in zip(compute_quotas(dataclasses.replace(data, stages=stages), 3300), range(3301), strict=True):
        assert all(abs(count - quota) < 1 for count, quota in zip(schedule.counts(row), quotas, strict=True))


def test_a_short_last_stage_is_exact_to_its_end_and_rounded_behind_it():
    weights = {"a": 0.12345678901, "b": 0.6, "c": 0.0000012345}
    data = make_data([(1000 * LENGTH, weights)])
    schedule = Schedule(data, largest_period=64)
    assert schedule.rounded == [(0, 1000)]
    for row, quotas in enumerate(compute_quotas(data, 1000)):
        assert all(abs(count - quota) < 1 for count, quota in zip(schedule.counts(row), quotas, strict=True))
    assert schedule.counts(1000 + 64 * 100)[2] >= 100


def test_a_stage_begins_at_its_row():
    data = make_data([(83, {"a": 1}), (77, {"b": 1, "c": 1}), (3, {"a": 1}), (100, {"c": 1})])
    schedule = Schedule(data)
    # 83 / 8 = 10.4, 160 / 8 = 20, 163 / 8 = 20.4: the third stage is shorter than half a row, and has none.
    assert schedule.stage_starts == (0, 10, 20, 20)
    drawn = "".join(schedule.names[schedule.locate(row)[0]] for row in range(60))
    assert drawn[:10] == "a" * 10 and sorted(drawn[10:20]) == list("bbbbbccccc") and drawn[20:] == "c" * 40
    assert [schedule.locate(row)[1] for row in range(20, 60)] == list(range(5, 45))


def test_weights_are_the_decimal_numbers_they_are_written_as():
    assert curriculum.normalise_weights({"a": 0.1, "b": 0.2}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert curriculum.normalise_weights({"a": 1 / 3, "b": 2 / 3}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert curriculum.normalise_weights({"a": 80, "b": 15.0, "c": 5})["b"] == Fraction(3, 20)


def test_a_curriculum_of_trillions_opens_at_once():
    """854 million rows of which a few hundred are kept."""
    trillion = 10**12
    stages = [
        (trillion, {"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.05, "e": 0.05}),
        (trillion * 3 // 2, {"a": 0.3, "b": 0.3, "c": 0.2, "d": 0.1, "e": 0.1}),
        (trillion, {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.1, "e": 0.05, "f": 0.05}),
    ]
    data = make_data(stages, length=4096)
    schedule = Schedule(data)
    assert schedule.locate(0) is not None and len(schedule._segments) == 2  # the stages to come are not looked at
    last = 3_500_000_000_000 // 4096
    quotas = [Fraction(0)] * 6
    for tokens, weights in stages:
        for number, name in enumerate(schedule.names):
            quotas[number] += Fraction(tokens, 4096) * Fraction(str(weights.get(name, 0)))
    assert all(abs(count - quota) < 2 for count, quota in zip(schedule.counts(last), quotas, strict=True))
    assert sum(len(segment.table) for segment in schedule._segments) < 1000


def test_a_row_that_is_none_is_refused():
    with pytest.raises(IndexError, match="rows count from 0"):
        Schedule(make_data([(80, {"a": 1})])).locate(-1)


@pytest.mark.parametrize("seed", range(6))
def test_a_domain_runs_out_at_the_step_that_is_told(seed):
    data, rng = draw_data(seed, most_rows=60), random.Random(seed)
    schedule = Schedule(data)
    sizes, batch_size, steps = {name: rng.randint(1, 40) for name in schedule.names}, rng.randint(1, 5), 60
    usages = curriculum.measure_usage(schedule, sizes, batch_size, steps)
    read = read_all(schedule, batch_size * steps)
    for number, usage in enumerate(usages):
        ordinals = [(row, ordinal) for row, (domain, ordinal) in enumerate(read) if domain == number]
        repeated = [row for row, ordinal in ordinals if ordinal >= sizes[usage.domain]]
        assert usage.rows_read == len(ordinals) and usage.rows == sizes[usage.domain]
        assert usage.epochs == len(ordinals) / sizes[usage.domain]
        assert usage.exhausted_at == (repeated[0] // batch_size + 1 if repeated else None)
    lines = curriculum.describe_repeats(data, sizes, batch_size, steps)
    assert len(lines) == sum(usage.exhausted_at is not None for usage in usages)


def test_what_is_read_again_is_told_in_a_line():
    data = make_data([(None, {"prose": 3, "sql": 1})])
    lines = curriculum.describe_repeats(data, {"prose": 10_000, "sql": 100}, batch_size=4, steps=150)
    with pytest.raises(UserError, match=r"'sql' \(builtin:sql\) has a weight in the stages but no rows"):
        curriculum.describe_repeats(data, {"prose": 10_000, "sql": 0}, batch_size=4, steps=150)
    assert lines == ["domain sql: its 100 rows last to step 101 of 150; it is read 1.5 times"]
    assert math.isclose(curriculum.measure_usage(Schedule(data), {"prose": 10_000}, 4, 150)[0].epochs, 0.045)
