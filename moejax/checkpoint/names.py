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
from moejax.families.family import NameTable, Source, Transform
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

    `tree[path][index]` has shape `shape`, `tensors[key][source_index]` has shape `part_shape`, the whole tensor `source_shape`.
    Where `transform` is not None the same numbers lie in another order there: read with `read_piece`, write through `to_source`.
    """

    path: Path
    index: tuple[int, ...]
    key: str
    source_index: SourceIndex
    shape: Shape
    source_shape: Shape
    transform: Transform | None = None
    head_width: int = 0  # of the rotary transform

    @property
    def part_shape(self) -> Shape:
        """The shape of `tensors[key][source_index]`."""
        return self.shape[::-1] if self.transform == "transposed" else self.shape


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
                pieces.append(Piece(path, index, source.key.format(l=layer), (), shape, shape, source.transform, config.head_width))
                continue
            for expert in range(config.num_experts):
                pieces.append(_expert_piece(path, (*index, expert), source, layer, expert, shape))
    return pieces


def _expert_piece(path: Path, index: tuple[int, ...], source: Source, layer: int, expert: int, shape: Shape) -> Piece:
    """The piece of one expert; `shape` is that of the leaf, experts first."""
    experts, rows, columns = shape
    key = source.key.format(l=layer, e=expert)
    stored = (columns, rows) if source.transform == "transposed" else (rows, columns)
    source_index: SourceIndex = ()
    source_shape: Shape = stored
    if source.flat:
        source_index = (slice(expert * stored[0], (expert + 1) * stored[0]),)
        source_shape = (experts * stored[0], stored[1])
    elif "{e}" not in source.key:
        source_index = (expert, slice(source.part * rows, (source.part + 1) * rows))
        source_shape = (experts, rows * source.parts, columns)
    return Piece(path, index, key, source_index, (rows, columns), source_shape, source.transform)


def read_piece(piece: Piece, read_into: Callable[[str, SourceIndex, np.ndarray], None], out: np.ndarray) -> None:
    """Fills `out` (contiguous, shape `piece.shape`) with a piece in the tree's order, in `out`'s dtype.

    `read_into(key, source_index, array)` fills a contiguous array with a part of a published tensor, as TensorFiles.read_into does.
    A piece without a transform is read straight into `out`; with one, a second array of its size is needed for a moment.
    """
    if piece.transform is None:
        read_into(piece.key, piece.source_index, out)
        return
    block = np.empty(piece.part_shape, out.dtype)
    read_into(piece.key, piece.source_index, block)
    out[...] = to_tree(piece, block)


def to_tree(piece: Piece, array: np.ndarray) -> np.ndarray:
    """`tensors[key][source_index]` in the order of the tree; a view where that is possible."""
    if piece.transform == "transposed":
        return array.T
    return _swap_rotary(array, piece.head_width // 2, 2) if piece.transform == "rotary" else array


def to_source(piece: Piece, array: np.ndarray) -> np.ndarray:
    """`tree[path][index]` in the order of the published tensor: the inverse of `to_tree`."""
    if piece.transform == "transposed":
        return array.T
    return _swap_rotary(array, 2, piece.head_width // 2) if piece.transform == "rotary" else array


def _swap_rotary(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """[heads * outer * inner, D] -> [heads * inner * outer, D]: in each head, row o * inner + i moves to row i * outer + o."""
    columns = array.shape[1]
    return array.reshape(-1, outer, inner, columns).swapaxes(1, 2).reshape(-1, columns)


def list_sources(config: ModelConfig, table: NameTable) -> dict[str, Shape]:
    """The published tensors of a model of `config`: key -> shape."""
    return {piece.key: piece.source_shape for piece in list_pieces(config, table)}


def import_tensors(
    config: ModelConfig,
    table: NameTable,
    read_into: Callable[[str, SourceIndex, np.ndarray], None],
    dtype_of: Callable[[Path, list[str]], np.dtype],
) -> dict[str, Any]:
    """The parameter tree, as nested dicts of numpy arrays, filled piece by piece: memory is that of the tree and no more.

    `read_into(key, source_index, array)` fills `array` (contiguous) with a part of a published tensor; `dtype_of(path, keys)` is the
    dtype of the leaf that the tensors `keys` make up.
    """
    keys: dict[Path, list[str]] = {}
    pieces = list_pieces(config, table)
    for piece in pieces:
        keys.setdefault(piece.path, []).append(piece.key)
    leaves = {
        path: np.empty(abstract.shape, dtype_of(path, keys[path])) for path, abstract in flatten_leaves(abstract_parameters(config)).items()
    }
    for piece in pieces:
        read_piece(piece, read_into, leaves[piece.path][(*piece.index, ...)])
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
            tensor[piece.source_index] = to_source(piece, np.asarray(leaves[piece.path][piece.index]))
        yield key, tensor
