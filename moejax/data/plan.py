"""What `train.py --data-plan` prints: stages, domains, tokens, shares and epochs of a run, before anything is read or allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moejax.config import DataConfig, Domain, RunConfig, Stage, UserError
from moejax.data import hub_text
from moejax.data.curriculum import Schedule, measure_usage, normalise_weights
from moejax.data.sources import DEFAULT_MEGABYTES, list_files

BYTES_PER_TOKEN = 3.5  # of text that no tokenizer has read yet; a rough guess


@dataclass(frozen=True)
class TextSize:
    """How much text a domain has: tokens to train on, None where nobody knows; and how one came to know."""

    tokens: int | None
    origin: str
    is_estimate: bool = True


def measure_text(domain: Domain, data: DataConfig, tokens_of: Callable[[Domain], int | None]) -> TextSize:
    """The training tokens of a domain: those prepared, else an estimate from what lies on the disk. Reads no file."""
    prepared = tokens_of(domain)
    if prepared is not None:
        return TextSize(prepared, f"prepared: {format_count(prepared)} tokens", is_estimate=False)
    limits = [limit for limit in (domain.max_megabytes, data.max_megabytes) if limit is not None]
    if domain.builtin is not None:
        size, what = min(limits, default=DEFAULT_MEGABYTES) * 1e6, "at most {}"
    elif domain.path.startswith(hub_text.PREFIX):
        return TextSize(None, "not prepared; on the Hub")
    else:
        sizes = _list_sizes(domain)
        if not sizes:
            return TextSize(None, "not prepared; nothing there yet")
        files = "1 file" if len(sizes) == 1 else f"{len(sizes):,} files"
        size, what = min([sum(sizes), *(limit * 1e6 for limit in limits)]), f"{{}} of {files}"
    tokens = int(size * (1 - data.held_out_fraction) / BYTES_PER_TOKEN)
    return TextSize(tokens, f"not prepared; {what.format(format_count(size) + 'B')}, about {format_count(tokens)} tokens")


def _list_sizes(domain: Domain) -> list[int]:
    """Bytes of every file that would be read for a domain; nothing where its path names none."""
    try:
        return [file.size for file in list_files(domain)]
    except UserError:
        return []


def describe_plan(config: RunConfig, tokens_of: Callable[[Domain], int | None]) -> str:
    """The plan of a run as text: one table a stage, and one of the whole run.

    `tokens_of` gives a domain's training tokens where its text is prepared, else None.
    """
    data, batch_size, steps = config.data, config.train.batch_size, config.steps
    schedule = Schedule(data)
    texts = {domain.name: measure_text(domain, data, tokens_of) for domain in data.sources}
    rows = steps * batch_size
    stages = data.curriculum
    lines = [
        f"{config.name}: {steps:,} steps of {batch_size:,} rows of {data.sequence_length:,} tokens, "
        f"{format_count(rows * data.sequence_length)} tokens in {len(stages)} stage{'s' * (len(stages) > 1)}"
    ]
    stops = [*schedule.stage_starts[1:], max(rows, schedule.stage_starts[-1])]
    for number, (stage, start, stop) in enumerate(zip(stages, schedule.stage_starts, stops, strict=True)):
        begins = f"begins at step {start // batch_size + 1:,} (row {start:,})"
        if start >= rows:
            lines += ["", f"stage {number + 1}  {begins}: not reached by this run"]
            continue
        stop = min(stop, rows)
        read = dict(zip(schedule.names, _subtract(schedule.counts(stop), schedule.counts(start)), strict=True))
        tokens = (stop - start) * data.sequence_length
        title = f"stage {number + 1}  {begins}, {format_count(tokens)} tokens{_compare_length(tokens, stage, config.tokens_per_step)}"
        weights = {name: float(weight) for name, weight in normalise_weights(stage.weights).items()}
        lines += ["", title, *_table(weights, read, texts, data.sequence_length)]
        lines += [
            f"  weights are rounded to multiples of 1/65,536 from row {row:,} on: no row's place would be quick to tell otherwise"
            for rounded, row in schedule.rounded
            if rounded == number and row < rows
        ]
    counts = dict(zip(schedule.names, schedule.counts(rows), strict=True))
    shares = {name: count / rows for name, count in counts.items()}
    lines += ["", "whole run", *_table(shares, counts, texts, data.sequence_length), "", "text"]
    width = max(map(len, texts))
    lines += [f"  {domain.name:<{width}}  {texts[domain.name].origin}  ({domain.path})" for domain in data.sources]
    return "\n".join([*lines, *_describe_ends(schedule, texts, config)])


def _describe_ends(schedule: Schedule, texts: Mapping[str, TextSize], config: RunConfig) -> list[str]:
    """A line for each domain that the run reads more than once."""
    length = config.data.sequence_length
    sizes = {name: max(text.tokens // length, 1) for name, text in texts.items() if text.tokens is not None}
    lines = []
    for usage in measure_usage(schedule, sizes, config.train.batch_size, config.steps):
        if usage.exhausted_at is not None:
            about = "about " if texts[usage.domain].is_estimate else ""
            lines.append(f"  {usage.domain} is read to its end by {about}step {usage.exhausted_at:,}, then again in another order")
    return lines


def _table(shares: Mapping[str, float], rows: Mapping[str, int], texts: Mapping[str, TextSize], length: int) -> list[str]:
    """Lines of domain, share, tokens and epochs."""
    width = max(6, *map(len, rows))
    lines = [f"  {'domain':<{width}}   share   tokens   epochs"]
    for name, count in rows.items():
        if not count and not shares.get(name):
            continue
        there = texts[name]
        if there.tokens is None:
            epochs = "?"
        else:
            epochs = f"{'~' * there.is_estimate}{count * length / max(there.tokens, 1):.2f}"
        lines.append(f"  {name:<{width}}  {100 * shares.get(name, 0.0):5.1f}%  {format_count(count * length):>7}  {epochs:>7}")
    return lines


def _compare_length(tokens: int, stage: Stage, tokens_per_step: int) -> str:
    """What to add where a run reads other than a stage's own tokens, by a step or more."""
    if stage.tokens is None or abs(tokens - stage.tokens) < tokens_per_step:
        return ""
    own = format_count(stage.tokens)
    return f" of its {own}: train.steps ends the run" if tokens < stage.tokens else f": its own {own}, and on with the same mixture"


def _subtract(later: list[int], earlier: list[int]) -> list[int]:
    return [late - early for late, early in zip(later, earlier, strict=True)]


def format_count(number: float) -> str:
    """A number in at most five characters and a letter: 614.4k, 1.5T."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            value = number / size
            text = f"{value:.3f}" if value < 10 else f"{value:.1f}"
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{letter}"
    return f"{number:.0f}"
