"""Runs one family's name table both ways: published tensors into the stacked parameter tree, and back.

The tables are data, in moejax/families; they say where one leaf of one layer lies. From a table and a configuration `list_pieces`
makes the flat list of copies that importing and exporting both are, so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.config import ModelConfig
from moejax.families.family import NameTable, Source
from moejax.families.layout import (
    EXPERT_LEAVES,
    Path,
    Shape,
    abstract_parameters,
    block_leaves,
    flatten_leaves,
    insert_leaf,
    locate_layer,
    outer_leaves,
)

SourceIndex = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """One contiguous run of numbers that lies both in a leaf of the tree and in a published tensor.

    `tree[path][index]` and `tensors[key][source_index]` have shape `shape`; `source_shape` is the whole tensor's.
    """

    path: Path
    index: tuple[int, ...]
    key: str
    source_index: SourceIndex
    shape: Shape
    source_shape: Shape


def list_pieces(config: ModelConfig, table: NameTable) -> list[Piece]:
    """All copies that make up a model of `config` in the layout of `table`: they cover every leaf once."""
    pieces = []
    for leaf, shape in outer_leaves(config).items():
        pieces.append(Piece(tuple(leaf.split("/")), (), table.sources[leaf].key, (), shape, shape))
    for layer in range(config.num_layers):
        block, index = locate_layer(config, layer)
        for leaf, shape in block_leaves(config, layer).items():
            path = (*block, *leaf.split("/"))
            source = table.sources[leaf]
            if leaf not in EXPERT_LEAVES:
                pieces.append(Piece(path, index, source.key.format(l=layer), (), shape, shape))
                continue
            for expert in range(config.num_experts):
                pieces.append(_expert_piece(path, (*index, expert), source, layer, expert, shape))
    return pieces


def _expert_piece(path: Path, index: tuple[int, ...], source: Source, layer: int, expert: int, shape: Shape) -> Piece:
    """The piece of one expert; `shape` is that of the leaf, experts first."""
    experts, rows, columns = shape
    key = source.key.format(l=layer, e=expert)
    if "{e}" in source.key:
        return Piece(path, index, key, (), (rows, columns), (rows, columns))
    source_index: SourceIndex = (expert, slice(source.part * rows, (source.part + 1) * rows))
    return Piece(path, index, key, source_index, (rows, columns), (experts, rows * source.parts, columns))


def list_sources(config: ModelConfig, table: NameTable) -> dict[str, Shape]:
    """The published tensors of a model of `config`: key -> shape."""
    return {piece.key: piece.source_shape for piece in list_pieces(config, table)}


def import_tensors(
    config: ModelConfig,
    table: NameTable,
    read_into: Callable[[Piece, np.ndarray], None],
    dtype_of: Callable[[Path, list[str]], np.dtype],
) -> dict[str, Any]:
    """The parameter tree, as nested dicts of numpy arrays, filled piece by piece: memory is that of the tree and no more.

    `read_into(piece, destination)` fills `destination` (contiguous, shape `piece.shape`); `dtype_of(path, keys)` is the dtype of
    the leaf that the tensors `keys` make up.
    """
    keys: dict[Path, list[str]] = {}
    pieces = list_pieces(config, table)
    for piece in pieces:
        keys.setdefault(piece.path, []).append(piece.key)
    leaves = {
        path: np.empty(abstract.shape, dtype_of(path, keys[path])) for path, abstract in flatten_leaves(abstract_parameters(config)).items()
    }
    for piece in pieces:
        read_into(piece, leaves[piece.path][(*piece.index, ...)])
    tree: dict[str, Any] = {}
    for path, array in leaves.items():
        insert_leaf(tree, path, array)
    return tree


def export_tensors(parameters: Mapping[str, Any], config: ModelConfig, table: NameTable) -> Iterator[tuple[str, np.ndarray]]:
    """The published tensors of `parameters`, one at a time in the table's order: (key, array), a fresh copy each."""
    leaves = flatten_leaves(dict(parameters))
    by_key: dict[str, list[Piece]] = {}
    for piece in list_pieces(config, table):
        by_key.setdefault(piece.key, []).append(piece)
    for key, pieces in by_key.items():
        tensor = np.empty(pieces[0].source_shape, leaves[pieces[0].path].dtype)
        for piece in pieces:
            tensor[piece.source_index] = leaves[piece.path][piece.index]
        yield key, tensor
