"""Writes a checkpoint of ours in a published layout: Hugging Face's (sharded safetensors, index, config) or Mistral's own.

Names and order of the numbers come from the same tables that importing runs on. Tensors are read from the checkpoint and written one
at a time; the destination is complete or not there.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moejax.checkpoint.atomic import write_directory
from moejax.checkpoint.detect import find_checkpoint
from moejax.checkpoint.mistral_files import CONSOLIDATED
from moejax.checkpoint.mistral_files import PARAMS as PARAMS_JSON
from moejax.checkpoint.names import Piece, list_pieces, to_source
from moejax.checkpoint.safetensors_file import make_header
from moejax.checkpoint.store import PARAMS, read_metadata, verify
from moejax.checkpoint.stored_slices import StoredSlices
from moejax.checkpoint.tokenizer_export import write_tokenizer_config
from moejax.checkpoint.torch_files import INDEX, SINGLE
from moejax.config import ModelConfig, UserError
from moejax.families import get_family
from moejax.families.family import NameTable
from moejax.families.layout import abstract_parameters, flatten_leaves

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.model.v*", "*tokenizer*.model.v*", "tokenizer.json", "tokenizer_config.json", "tokenizer_settings.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "tekken.json",
)  # fmt: skip
GENERATION = "generation_config.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its key, dtype and shape, and the pieces of the tree that make it up."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export(
    src: str | Path,
    dst: str | Path,
    to: Literal["hf", "mistral"] = "hf",
    max_shard_size: str | int = "5GB",
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the checkpoint `src` (one of ours, or a run: its newest) to the new directory `dst`.

    to="hf": model.safetensors, or model-0000i-of-0000n.safetensors of at most `max_shard_size` each with their index; config.json,
    generation_config.json. to="mistral": params.json and one consolidated.safetensors. Tokenizer files are copied. Weights keep their
    dtype. `report(done, total)` is called with bytes as they are written. Memory: one tensor, and one chunk of the checkpoint's.

    Raises UserError where `dst` exists or does not fit the disk, for a model that the layout has no words for, and where `src` is
    not as it was written.
    """
    kind, directory = find_checkpoint(src)
    destination = Path(dst).absolute()
    if destination.exists():
        raise UserError(f"{destination} exists already; give another path, or remove it first")
    if kind != "moejax":
        raise UserError(f"{src} is a published checkpoint already ({kind}); export writes checkpoints of moejax, convert it first")
    config = read_metadata(directory).config
    table, values = _choose_layout(config, to)
    verify(directory, PARAMS)
    slices = StoredSlices(directory / PARAMS)
    _check_shapes(directory, slices, config)
    tensors = _list_tensors(config, table, slices)
    files = _name_files(_split(tensors, _parse_size(max_shard_size) if to == "hf" else None), to)
    total = sum(tensor.bytes for tensor in tensors)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(done, total)

    with write_directory(destination, total + 10_000_000) as temporary:
        for name, shard in files.items():
            _write_file(temporary / name, shard, slices, count)
        if to == "hf":
            if len(files) > 1:
                places = {tensor.key: name for name, shard in files.items() for tensor in shard}
                _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
            # The weights' own dtype, whatever the configuration says they are computed in.
            _write_json(temporary / "config.json", values | {"torch_dtype": _commonest_dtype(tensors)})
        else:
            _write_json(temporary / PARAMS_JSON, values)
        _copy_companions(temporary, (directory, Path(src)), config, with_generation=to == "hf")


def _choose_layout(config: ModelConfig, to: str) -> tuple[NameTable, dict[str, Any]]:
    """The name table and the values of the configuration file of a layout."""
    family = get_family(config.family)
    if to == "hf":
        return family.tables[0], family.config_to_hf(config)
    if to != "mistral":
        raise UserError(f"export(to={to!r}): expected 'hf' or 'mistral'")
    if family.original is None or family.config_to_original is None:
        raise UserError(f"{config.family} was never published in Mistral's own layout; export it with to='hf'")
    return family.original, family.config_to_original(config)


def _check_shapes(directory: Path, slices: StoredSlices, config: ModelConfig) -> None:
    expected = {path: leaf.shape for path, leaf in flatten_leaves(abstract_parameters(config)).items()}
    stored = slices.shapes()
    odd = sorted(path for path in expected.keys() | stored.keys() if expected.get(path) != stored.get(path))
    if odd:
        raise UserError(
            f"{directory}: {len(odd)} of its arrays are not those of its configuration, such as {'/'.join(odd[0])} "
            f"{stored.get(odd[0], 'absent')}, expected {expected.get(odd[0], 'absent')}; use another checkpoint"
        )


def _list_tensors(config: ModelConfig, table: NameTable, slices: StoredSlices) -> list[_Tensor]:
    """What is to be written, layer by layer; or leaf by leaf, where the checkpoint's chunks hold several layers or experts."""
    pieces = list_pieces(config, table)
    blocks = [(piece.path, slices.block_of(piece.path, piece.index)) for piece in pieces]
    if len(set(blocks)) < len(pieces):
        order = {path: place for place, path in enumerate(dict.fromkeys(piece.path for piece in pieces))}
        ranked = sorted(zip(blocks, pieces, strict=True), key=lambda pair: (order[pair[0][0]], pair[0][1], pair[1].index))
        pieces = [piece for _, piece in ranked]
    by_key: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    return [_Tensor(key, slices.dtype(parts[0].path), parts[0].source_shape, tuple(parts)) for key, parts in by_key.items()]


def _parse_size(size: str | int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B|)", str(size).strip().upper())
    if not match or float(match[1]) * _UNITS[match[2]] < 1:
        raise UserError(
            f"max_shard_size={size!r} is no size; expected a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB, as '5GB'"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _split(tensors: list[_Tensor], limit: int | None) -> list[list[_Tensor]]:
    """Runs of tensors of at most `limit` bytes together; a larger tensor stands alone."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if limit is not None and shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _name_files(shards: list[list[_Tensor]], to: str) -> dict[str, list[_Tensor]]:
    if len(shards) == 1:
        return {SINGLE if to == "hf" else CONSOLIDATED: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _write_file(path: Path, tensors: list[_Tensor], slices: StoredSlices, count: Callable[[int], None]) -> None:
    with path.open("wb") as file:
        file.write(make_header({tensor.key: (tensor.dtype, tensor.shape) for tensor in tensors}))
        for tensor in tensors:
            array = np.empty(tensor.shape, tensor.dtype)
            for piece in tensor.pieces:
                array[piece.source_index] = to_source(piece, slices.read(piece.path, piece.index))
            file.write(array.reshape(-1).view(np.uint8).data)
            count(tensor.bytes)


def _commonest_dtype(tensors: list[_Tensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_companions(destination: Path, places: tuple[Path, ...], config: ModelConfig, with_generation: bool) -> None:
    """Copies tokenizer files and generation defaults from the first of `places` that has them."""
    for pattern in (*TOKENIZER_FILES, *((GENERATION,) if with_generation else ())):
        found = next((files for place in places if (files := sorted(place.glob(pattern)))), [])
        for file in found:
            shutil.copyfile(file, destination / file.name)
    write_tokenizer_config(destination)
    if with_generation and not (destination / GENERATION).exists():
        eos = config.eos_token_ids
        values = {"bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}
        _write_json(destination / GENERATION, values)
