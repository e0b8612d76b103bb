"""Converts a published model to a checkpoint of moejax, piece by piece: what the command moejax-convert and moejax.convert do.

Memory is that of a few tensors, whatever the model's size. The destination appears when it is complete; a conversion that was killed
goes on where it was when it is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoint import hub, transfer
from moejax.checkpoint.atomic import full_disk_error, is_full_disk, move_into_place, remove_leftovers, sync_directory
from moejax.checkpoint.manifest import write_manifest
from moejax.checkpoint.source import Source, open_source
from moejax.checkpoint.store import PARAMS, describe_checkpoint, refuse_existing
from moejax.checkpoint.stream import LARGEST_CHUNK, ArrayLayout, list_chunks, plan_array, write_descriptions
from moejax.config import UserError, to_json
from moejax.families.layout import Path as TreePath
from moejax.families.layout import abstract_parameters, flatten_leaves

DTYPES = ("float32", "bfloat16", "float16")
JOURNAL, UNFINISHED = "journal.jsonl", "checkpoint"
INTERPRETER_BYTES = 400_000_000  # anonymous memory of Python with jax
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a conversion reads, writes and needs, in bytes; known before any weight is moved."""

    layouts: dict[TreePath, ArrayLayout]
    read: int
    write: int
    files: int
    memory: int


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: str | None = None,
    *,
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    merge_lora: str | Path | None = None,
    lora_scaling: float | None = None,
    revision: str | None = None,
    say: Say = lambda text: None,
) -> Path:
    """Writes the published model `source`, a directory or an id of the Hub, as a checkpoint that `moejax.load` reads; returns its path.

    dtype: "float32", "bfloat16" or "float16"; None keeps that of every weight. verify: reads every tensor of source and checkpoint
    again and compares them bit by bit before the checkpoint appears. overwrite: replaces a checkpoint of moejax at `destination`.
    dry_run: only says what would be done. merge_lora: the directory of a LoRA adapter to merge into the weights, with the factor
    `lora_scaling` instead of its own. revision: the branch, tag or commit of a Hub id. `say` gets a line of text at each stage.

    Raises UserError, and leaves `destination` as it was, for what `open_source` refuses, an existing destination, a disk without
    room, weights that are NaN or infinite (in `dtype`), files that cannot be read.
    """
    destination = Path(destination).expanduser().absolute()
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}, or nothing to keep the dtype of the weights")
    if lora_scaling is not None and merge_lora is None:
        raise UserError(f"lora_scaling={lora_scaling:g} is given without an adapter; name its directory with merge_lora")
    refuse_existing(destination, overwrite)
    if dry_run and hub.is_id(source):
        _describe_download(str(source), revision, say)
        return destination
    directory, name = hub.locate(source, revision, say)
    with open_source(directory, dtype, merge_lora, lora_scaling) as opened:
        plan = make_plan(opened)
        say(describe_plan(opened, destination, plan))
        staging = destination.with_name(f".{destination.name}.converting")
        _check_room(destination, staging, plan)
        if dry_run:
            return destination
        with _staged(destination, staging, plan):
            _fill(opened, name, staging, plan, verify, say)
            move_into_place(staging / UNFINISHED, destination)
            shutil.rmtree(staging, ignore_errors=True)
    say(f"{destination} is complete; read it with moejax.load({str(destination)!r}) or sample.py")
    return destination


def _describe_download(identity: str, revision: str | None, say: Say) -> None:
    """What converting a model of the Hub begins with; the rest is known once its files are here."""
    files = hub.list_files(identity, revision)
    say(f"fetches {identity}: {len(files)} files, {show_bytes(sum(files.values()))}, into the cache of the Hub; writes about as much again")


def make_plan(source: Source) -> Plan:
    """The arrays that a source becomes, and what that takes. Raises UserError for weights in a dtype that no model of ours has."""
    for path in source.dtypes:
        if source.dtype_of(path).name not in DTYPES:
            raise UserError(f"{source.directory}: the weights of {'/'.join(path)} are {source.dtype_of(path)}; name another with --dtype")
    shapes = {path: leaf.shape for path, leaf in flatten_leaves(abstract_parameters(source.config)).items()}
    stacked = {piece.path: len(piece.index) for piece in source.pieces}
    layouts = {path: plan_array(path, shape, source.dtype_of(path), stacked[path]) for path, shape in shapes.items()}
    # One that is turned over, or rounded after a sum, needs its size again for a moment; the file's dtype may be twice as wide.
    held = [2 if piece.transform or (source.adapter and source.adapter.touches(piece)) else 0 for piece in source.pieces]
    sizes = [math.prod(piece.shape) * layouts[piece.path].dtype.itemsize for piece in source.pieces]
    files = sum(len(list_chunks(layouts[piece.path], piece.index)) for piece in source.pieces)
    return Plan(
        layouts,
        read=sum(path.stat().st_size for path in source.files),
        write=sum(sizes) + sum(path.stat().st_size for path in source.extra_files) + 300 * (files + len(layouts)),
        files=files,
        memory=INTERPRETER_BYTES
        + transfer.THREADS * (max(size * (1 + more) for size, more in zip(sizes, held, strict=True)) + LARGEST_CHUNK),
    )


def describe_plan(source: Source, destination: Path, plan: Plan) -> str:
    """A few lines for the user: what is read, written and needed."""
    config = source.config
    dtypes = sorted({layout.dtype.name for layout in plan.layouts.values()})
    carried = ", ".join(path.name for path in source.extra_files) or "none"
    free = shutil.disk_usage(_existing_parent(destination)).free
    merged = [] if source.adapter is None else [f"merges  {source.adapter.describe()}"]
    return "\n".join(
        [
            f"reads   {source.directory}: {source.layout}, {show_bytes(plan.read)}",
            f"model   {config.family}, {config.num_layers} layers, hidden size {config.hidden_size}, {config.num_experts} experts",
            *merged,
            f"writes  {destination}: {show_bytes(plan.write)} of {' and '.join(dtypes)} in {plan.files:,} files",
            f"carries {carried}; EOS {', '.join(map(str, config.eos_token_ids)) or 'none'}",
            f"needs   {show_bytes(plan.write)} of disk ({show_bytes(free)} are free there), {show_bytes(plan.memory)} of memory",
        ]
    )


def show_bytes(count: int) -> str:
    """A number of bytes as one reads it: 1.23 GB, 4.56 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _check_room(destination: Path, staging: Path, plan: Plan) -> None:
    """Raises UserError where the disk has no room for what is not written yet."""
    there = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()) if staging.is_dir() else 0
    free = shutil.disk_usage(_existing_parent(destination)).free
    if plan.write - there > free:
        raise full_disk_error(destination, plan.write - there, free)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


@contextlib.contextmanager
def _staged(destination: Path, staging: Path, plan: Plan) -> Iterator[None]:
    """Makes the place beside `destination` where the checkpoint grows, and removes it on any error.

    An interrupt leaves it, as a kill does: the next run goes on from it.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(destination.parent)
        (staging / UNFINISHED).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error}; give another destination") from error
    try:
        yield
    except transfer.Busy:
        raise  # it belongs to the other process
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        if is_full_disk(error):
            raise full_disk_error(destination, plan.write, shutil.disk_usage(destination.parent).free) from error
        raise


def _fill(source: Source, name: str | None, staging: Path, plan: Plan, verify: bool, say: Say) -> None:
    """Makes staging/checkpoint a whole checkpoint, on the disk."""
    unfinished = staging / UNFINISHED
    with transfer.Journal(staging / JOURNAL, _fingerprint(source)) as journal:
        if journal.is_resumed:
            say(f"goes on with a conversion that was stopped: {len(journal.pieces):,} of {len(source.pieces):,} pieces are written")
        else:
            shutil.rmtree(unfinished)
            unfinished.mkdir()
            journal.begin(_fingerprint(source))
        write_descriptions(unfinished / PARAMS, plan.layouts)
        started = time.monotonic()
        total = sum(math.prod(layout.shape) * layout.dtype.itemsize for layout in plan.layouts.values())
        progress = transfer.Progress("copied", total)
        transfer.copy_pieces(source, plan.layouts, unfinished / PARAMS, journal, progress)
        progress.finish()
        seconds = time.monotonic() - started
        say(f"copied {show_bytes(total)} in {seconds:,.1f} s, {total / 1e9 / seconds:.2f} GB/s")
        if verify:
            progress = transfer.Progress("compared", total)
            transfer.compare_pieces(source, plan.layouts, unfinished / PARAMS, progress)
            progress.finish()
            say(f"compared all {len({piece.key for piece in source.pieces}):,} tensors with their source: every bit is the same")
        for path in source.extra_files:
            shutil.copyfile(path, unfinished / path.name)
        sums = {f"{PARAMS}/{name}": entry for files in journal.pieces.values() for name, entry in files.items()}
        write_manifest(unfinished, describe_checkpoint(source.config, source=_describe_source(source, name, journal.hashes)), sums)
        sync_directory(unfinished)


def _describe_source(source: Source, name: str | None, hashes: dict[str, str]) -> dict[str, Any]:
    """Where the weights came from, for moejax.json; the SHA-256 of a file is what the Hugging Face Hub shows for it."""
    labels = [(path, source.label(path)) for path in source.files]
    files = [{"name": label, "bytes": path.stat().st_size, "sha256": hashes[label]} for path, label in labels]
    values = {"name": name or source.directory.resolve().name, "layout": source.layout, "files": files}
    return values if source.adapter is None else values | {"merged": source.adapter.describe()}


def _fingerprint(source: Source) -> str:
    """What must be the same for a conversion to go on with another's pieces: files and their times, configuration, dtypes, cuts."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (*source.files, *source.extra_files)]
    dtypes = sorted((path, source.dtype_of(path).name) for path in source.dtypes)
    pieces = [(piece.path, piece.index, piece.key) for piece in source.pieces]
    merged = None if source.adapter is None else source.adapter.describe()
    what = [merged, str(source.directory.resolve()), source.layout, files, to_json(source.config), dtypes, pieces, LARGEST_CHUNK]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
