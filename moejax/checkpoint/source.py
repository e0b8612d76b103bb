"""The one interface that converting and importing read a model through, whatever layout its files have.

`open_source` finds the layout of a directory in LAYOUTS, in their order, and gives the model's configuration and the list of copies
(`Piece`) that make it up. A new layout is one function that makes a `Source` and one line in LAYOUTS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint import mistral_files, torch_files
from moejax.checkpoint.lora import Adapter, open_adapter
from moejax.checkpoint.manifest import METADATA
from moejax.checkpoint.names import Piece, list_pieces, read_piece
from moejax.checkpoint.store import STEPS
from moejax.checkpoint.torch_files import INDEX, SINGLE, TensorFiles
from moejax.config import ModelConfig, UserError
from moejax.families import get_family
from moejax.families.layout import Path as TreePath
from moejax.families.layout import abstract_parameters, flatten_leaves, insert_leaf

# What is carried along beside the weights: tokenizers, chat templates, defaults of generation.
EXTRA_FILES = (
    "tokenizer.model", "tokenizer.model.v*", "*tokenizer*.model.v*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer_settings.json", "chat_template.json", "chat_template.jinja", "generation_config.json", "tekken.json",
)  # fmt: skip


@dataclass
class Source:
    """A published model that is open for reading. `pieces` cover every leaf of the parameter tree once, in the order of the files.

    `read_into(piece, out)` fills `out` (C-contiguous, shape `piece.shape`, any float dtype) with a piece, from several threads at
    once; `file_of(piece)` is the file it comes from; `dtypes` are those of the files, by leaf. `files` are all that weights are read
    from, and the configuration.
    """

    directory: Path
    layout: str
    config: ModelConfig
    pieces: list[Piece]
    dtypes: dict[TreePath, np.dtype]
    files: list[Path]
    read_into: Callable[[Piece, np.ndarray], None]
    file_of: Callable[[Piece], Path]
    extra_files: list[Path] = field(default_factory=list)
    dtype: str | None = None
    adapter: Adapter | None = None

    def label(self, file: Path) -> str:
        """The name of one of `files`, unlike that of all others: a model and its adapter may both have a config.json."""
        is_adapters = self.adapter is not None and file in self.adapter.files
        return f"adapter/{file.name}" if is_adapters else file.name

    def dtype_of(self, path: TreePath) -> np.dtype:
        """The dtype that the leaf at `path` is to have: the one asked for, else that of the files."""
        return self.dtypes[path] if self.dtype is None else np.dtype(jnp.dtype(self.dtype))


@dataclass(frozen=True)
class Layout:
    """One way in which published models lie in a directory."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[[Path, str | None], AbstractContextManager[Source]]


def find_layouts(directory: Path) -> list[Layout]:
    """The layouts that `directory` holds, the one to be read first."""
    return [layout for layout in LAYOUTS if layout.matches(directory)]


@contextlib.contextmanager
def open_source(
    path: str | Path, dtype: str | None = None, merge_lora: str | Path | None = None, lora_scaling: float | None = None
) -> Iterator[Source]:
    """Opens the published model in the directory `path`; only headers are read. `dtype` is that of all leaves; None keeps the files'.

    Where it has several layouts, the first of LAYOUTS is read, and `source.layout` says so. `merge_lora` is the directory of an
    adapter that is added to the weights as they are read, `lora_scaling` its factor instead of its own. Raises UserError for what is
    no such model, for formats that are not read, and for tensors that are missing, unexpected or of the wrong shape.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{directory} {'is a file' if directory.exists() else 'does not exist'}; expected the directory of a model")
    if (directory / METADATA).exists():
        raise UserError(
            f"{directory} is a checkpoint of moejax already (it has {METADATA}); there is nothing to convert; --to writes it for others"
        )
    if (directory / STEPS).is_dir():
        raise UserError(f"{directory} is a run of moejax (it has {STEPS}/); there is nothing to convert, --to writes it for others")
    layouts = find_layouts(directory)
    # Where nothing matches, the Hugging Face reader says what is there instead and what to do about it.
    chosen = layouts[0] if layouts else LAYOUTS[0]
    with chosen.open(directory, dtype) as source:
        if len(layouts) > 1:
            others = [layout.name for layout in layouts[1:]]
            source.layout += f" (chosen before {', '.join(others)}, which {'lies' if len(others) == 1 else 'lie'} there too)"
        source.config = _take_generation_defaults(source.config, directory)
        source.extra_files = sorted({file for pattern in EXTRA_FILES for file in directory.glob(pattern) if file.is_file()})
        if merge_lora is not None:
            _merge_adapter(source, Path(merge_lora).expanduser(), lora_scaling)
        yield source


def _merge_adapter(source: Source, directory: Path, scaling: float | None) -> None:
    """Makes `source` give the weights with an adapter added, in float32 and rounded once."""
    adapter = open_adapter(directory, source.config, scaling)
    read_into = source.read_into

    def read_merged(piece: Piece, out: np.ndarray) -> None:
        if not adapter.touches(piece):
            read_into(piece, out)
            return
        is_wide = jnp.promote_types(source.dtypes[piece.path], out.dtype) == out.dtype  # it holds what the file holds
        exact = out if is_wide else np.empty(piece.shape, np.float32)
        read_into(piece, exact)
        adapter.merge_into(piece, exact, out)

    source.read_into, source.adapter = read_merged, adapter
    source.files += adapter.files


def read_leaves(source: Source) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """(path, array) of one parameter after another, in the dtypes of the source; memory is that of one, if the caller lets go of it."""
    pieces = defaultdict(list)
    for piece in source.pieces:
        pieces[piece.path].append(piece)
    for path, abstract in flatten_leaves(abstract_parameters(source.config)).items():
        array = np.empty(abstract.shape, source.dtype_of(path))
        for piece in pieces[path]:
            source.read_into(piece, array[(*piece.index, ...)])
        yield path, array


def read_tree(source: Source, place: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, array: array) -> dict[str, Any]:
    """The whole parameter tree as nested dicts of numpy arrays, or of what `place` makes of each as soon as it is read."""
    tree: dict[str, Any] = {}
    for path, array in read_leaves(source):
        insert_leaf(tree, path, place(path, array))
    return tree


def _take_generation_defaults(config: ModelConfig, directory: Path) -> ModelConfig:
    """The configuration with the EOS ids of generation_config.json, which may name several where config.json names one."""
    path = directory / "generation_config.json"
    if not path.exists():
        return config
    try:
        ids = json.loads(path.read_bytes()).get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int and 0 <= token < config.vocab_size for token in ids):
            raise ValueError(f"eos_token_id is {ids}; expected ids below {config.vocab_size:,}")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from error
    return dataclasses.replace(config, eos_token_ids=tuple(ids)) if ids else config


@contextlib.contextmanager
def _open_hugging_face(directory: Path, dtype: str | None) -> Iterator[Source]:
    """Safetensors of Hugging Face, one file or those of an index."""
    config = torch_files.read_model_config(directory, dtype)
    with torch_files.open_tensors(directory) as files:
        yield _make_source("Hugging Face", config, files, ("config.json", INDEX), dtype)


@contextlib.contextmanager
def _open_mistral(directory: Path, dtype: str | None) -> Iterator[Source]:
    """Mistral's own layout: safetensors, or pickles."""
    config = mistral_files.read_model_config(directory, dtype)
    with mistral_files.open_tensors(directory) as files:
        yield _make_source("Mistral", config, files, (mistral_files.PARAMS,), dtype)


def _make_source(publisher: str, config: ModelConfig, files: TensorFiles, described_by: tuple[str, ...], dtype: str | None) -> Source:
    """The source that open files are; `described_by` are the files beside them that belong to the model."""
    table = torch_files.choose_table(get_family(config.family), config, files)
    torch_files.check_tensors(config, table, files)
    pieces = list_pieces(config, table)
    dtypes: dict[TreePath, np.dtype] = {}
    for piece in pieces:
        dtype_here = files.dtype(piece.key)
        before = dtypes.setdefault(piece.path, dtype_here)
        dtypes[piece.path] = before if before == dtype_here else np.dtype(jnp.promote_types(before, dtype_here))
    tensors = files.tensors
    pieces.sort(key=lambda piece: (tensors[piece.key].file.name, tensors[piece.key].offset, piece.index, piece.path))
    weights = sorted({tensor.file for tensor in tensors.values()})
    kind = "safetensors" if weights[0].suffix == ".safetensors" else "pickles"
    names = table.name.removeprefix(publisher)  # nothing, or a comma and what is special
    return Source(
        files.directory,
        f"{publisher} {kind}{names}, {len(weights)} file{'s' if len(weights) > 1 else ''}",
        config,
        pieces,
        dtypes,
        [files.directory / name for name in described_by if (files.directory / name).exists()] + weights,
        lambda piece, out: read_piece(piece, files.read_into, out),
        lambda piece: tensors[piece.key].file,
        dtype=dtype,
    )


LAYOUTS: tuple[Layout, ...] = (
    Layout(f"Hugging Face, {INDEX}", lambda directory: (directory / INDEX).exists(), _open_hugging_face),
    Layout(f"Hugging Face, {SINGLE}", lambda directory: (directory / SINGLE).exists(), _open_hugging_face),
    Layout("Mistral, consolidated", mistral_files.holds_consolidated, _open_mistral),
)
