"""Merges LoRA adapters into weights: W + scale * B A, in float32, rounded once to the dtype of W.

Read are adapters of PEFT (adapter_config.json with adapter_model.safetensors; one module per expert, or the fused experts of
transformers 5) and of mistral-inference (lora.safetensors). Any subset of the matrices may be adapted, the router too. An adapter is
never merged in part: a tensor that belongs to no matrix of the model, or does not fit it, is an error before anything is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.names import Piece, list_pieces, to_tree
from moejax.checkpoint.peft_config import PEFT_CONFIG, PeftScaling, read_peft_scaling
from moejax.checkpoint.safetensors_file import read_header
from moejax.checkpoint.torch_files import TensorFiles, shorten
from moejax.config import ModelConfig, UserError
from moejax.families import get_family
from moejax.families.layout import flatten_leaves, insert_leaf

PEFT_WEIGHTS = "adapter_model.safetensors"
MISTRAL_WEIGHTS = "lora.safetensors"
MISTRAL_SCALE = 2.0  # what mistral-inference's load_lora multiplies by unless told otherwise; the file does not say
MERGED_AT_ONCE = 1 << 20  # numbers held in float32
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_FUSED = re.compile(r"(?P<experts>model\.layers\.(?P<layer>\d+)\.mlp\.experts)(\.base_layer)?")


@dataclass(frozen=True)
class LowRank:
    """One update of one matrix of the tree: `scale * b @ a`, with a [rank, in] and b [out, rank]."""

    module: str
    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter, by the place of each matrix in the parameter tree: (path of the leaf, index into it) -> its updates."""

    file: Path
    format: str  # "PEFT" or "mistral-inference"
    updates: Mapping[tuple[tuple[str, ...], tuple[int, ...]], tuple[LowRank, ...]]

    @property
    def files(self) -> list[Path]:
        """All that it is read from."""
        described = self.file.with_name(PEFT_CONFIG)
        return [described, self.file] if self.format == "PEFT" else [self.file]

    def touches(self, piece: Piece) -> bool:
        """Whether the adapter changes `tree[piece.path][piece.index]`."""
        return (piece.path, piece.index) in self.updates

    def merge_into(self, piece: Piece, array: np.ndarray, out: np.ndarray | None = None) -> None:
        """Writes `array` (shape piece.shape, in the tree's order) with the update of `piece` to `out` (None: to `array` itself).

        The sum is taken in float32, some rows at a time, and rounded once to the dtype of `out`.
        """
        out = array if out is None else out
        step = max(1, MERGED_AT_ONCE // piece.shape[-1])
        for first in range(0, piece.shape[0], step):
            rows = slice(first, first + step)
            merged = array[rows].astype(np.float32)
            for update in self.updates.get((piece.path, piece.index), ()):
                merged += (np.float32(update.scale) * update.b[rows]) @ update.a
            out[rows] = merged

    def describe(self) -> str:
        """One line: format, number of matrices, ranks and scales."""
        every = [update for updates in self.updates.values() for update in updates]
        ranks = sorted({update.a.shape[0] for update in every})
        scales = sorted({update.scale for update in every})
        return (
            f"{self.format} adapter {self.file}: {len(self.updates)} matrices, rank {', '.join(map(str, ranks))}, "
            f"scale {', '.join(f'{scale:g}' for scale in scales)}"
        )


def merge_lora(params: Mapping[str, Any], config: ModelConfig, adapter_directory: str | Path, scale: float | None = None) -> dict[str, Any]:
    """The tree `params` with an adapter merged in; leaves it does not touch are shared with `params`, the others are new.

    `scale` replaces the factor that the adapter's configuration gives (PEFT: lora_alpha / r, or / sqrt(r) with rsLoRA;
    mistral-inference: 2). Raises UserError as `open_adapter` does.
    """
    adapter = open_adapter(adapter_directory, config, scale)
    leaves = flatten_leaves(dict(params))
    merged: dict[tuple[str, ...], np.ndarray] = {}
    for piece in list_pieces(config, get_family(config.family).tables[0]):
        if adapter.touches(piece):
            array = merged.setdefault(piece.path, np.array(leaves[piece.path]))
            adapter.merge_into(piece, array[(*piece.index, ...)])
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        new = merged.get(path, leaf)
        insert_leaf(tree, path, jax.device_put(new, leaf.sharding) if path in merged and isinstance(leaf, jax.Array) else new)
    return tree


def open_adapter(path: str | Path, config: ModelConfig, scale: float | None = None) -> Adapter:
    """Reads the adapter in a directory (or a lora.safetensors by its own path) and finds the matrix of each of its tensors.

    Raises UserError, naming file and tensor, for anything but plain LoRA (DoRA, biases, modules saved whole, ...), for tensors that
    belong to no matrix of a model of `config`, for an A without its B, and for ranks and shapes that do not fit.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path} does not exist; expected the directory of an adapter")
    if (directory / PEFT_CONFIG).exists() and path.name != MISTRAL_WEIGHTS:
        file, scaling = directory / PEFT_WEIGHTS, read_peft_scaling(directory / PEFT_CONFIG, scale)
        kind = "PEFT"
        if not file.exists():
            pickle = (
                "; adapter_model.bin is a pickle, which can run any program and is not read"
                if (directory / "adapter_model.bin").exists()
                else ""
            )
            raise UserError(f"{directory} has {PEFT_CONFIG} but no {PEFT_WEIGHTS}{pickle}; save the adapter as safetensors with PEFT")
    else:
        file, kind = (path if path.is_file() else path / MISTRAL_WEIGHTS), "mistral-inference"
        scaling = PeftScaling(fixed=MISTRAL_SCALE if scale is None else float(scale))
        if not file.exists():
            raise UserError(
                f"{path} holds no adapter: looked for {PEFT_CONFIG} with {PEFT_WEIGHTS} (PEFT) and {MISTRAL_WEIGHTS} (mistral-inference)"
            )
    return Adapter(file, kind, _place_updates(file, _read_pairs(file), config, scaling))


def _read_pairs(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """The adapter's matrices in float32: module -> {"A": ..., "B": ...}."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    with TensorFiles(file.parent, read_header(file)) as files:
        magnitudes = [key for key in files.tensors if "lora_magnitude_vector" in key]
        if magnitudes:
            raise UserError(f"{file} is a DoRA adapter (it holds {magnitudes[0]}), which is not merged; only plain LoRA is")
        odd = [key for key, tensor in files.tensors.items() if not _KEY.fullmatch(key) or len(tensor.shape) != 2]
        if odd:
            raise UserError(
                f"{file} holds {shorten(odd)}: no lora_A or lora_B of a linear layer; biases, embeddings and modules that were "
                "trained whole are not merged; train the adapter without them"
            )
        for key, tensor in files.tensors.items():
            match = _KEY.fullmatch(key)
            assert match is not None
            files.dtype(key)  # refuses quantised ones by name
            array = np.empty(tensor.shape, np.float32)
            files.read_into(key, (), array)
            if not np.isfinite(array).all():
                raise UserError(f"{file}: {key} holds NaN or infinity; the adapter's training has failed, use another one")
            pairs.setdefault(match["module"].removeprefix("base_model.model."), {})[match["side"]] = array
    if not pairs:
        raise UserError(f"{file} holds no tensors; use another adapter")
    return pairs


def _place_updates(
    file: Path, pairs: dict[str, dict[str, np.ndarray]], config: ModelConfig, scaling: PeftScaling
) -> dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[LowRank, ...]]:
    modules = _list_modules(config)
    lone = [module for module, pair in pairs.items() if len(pair) != 2]
    if lone:
        raise UserError(f"{file}: {shorten(lone)} have lora_A or lora_B alone; the file is not whole, copy or save it again")
    unknown = [module for module in pairs if module not in modules and not _is_fused(module, config)]
    if unknown:
        raise UserError(
            f"{file}: {shorten(unknown)} match no matrix of the model ({config.family}, {config.num_layers} layers, {config.num_experts} "
            "experts); nothing was merged; it is an adapter of another model"
        )
    found: dict[tuple[tuple[str, ...], tuple[int, ...]], list[LowRank]] = {}
    for module, pair in pairs.items():
        if module in modules:
            placed = [_place_matrix(file, module, pair["A"], pair["B"], modules[module], scaling)]
        else:
            placed = _place_fused(file, module, pair["A"], pair["B"], modules, config, scaling)
        for piece, update in placed:
            found.setdefault((piece.path, piece.index), []).append(update)
    return {place: tuple(updates) for place, updates in found.items()}


def _list_modules(config: ModelConfig) -> dict[str, Piece]:
    """Every matrix that an adapter can name, in any layout of the family: the key of its weight without ".weight" -> its piece."""
    modules = {}
    for table in get_family(config.family).tables:
        for piece in list_pieces(config, table):
            if piece.key.endswith(".weight") and len(piece.shape) == 2 and piece.path[0] != "embed":
                modules[piece.key.removesuffix(".weight")] = piece
    return modules


def _place_matrix(file: Path, module: str, a: np.ndarray, b: np.ndarray, piece: Piece, scaling: PeftScaling) -> tuple[Piece, LowRank]:
    """The update of a matrix that has an adapter to itself."""
    rank = a.shape[0]
    if (b.shape[0], a.shape[1]) != piece.shape or b.shape[1] != rank:
        raise UserError(
            f"{file}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} do not fit: expected [rank, {piece.shape[1]}] and "
            f"[{piece.shape[0]}, rank]; it is an adapter of another model"
        )
    return piece, LowRank(module, a, to_tree(piece, b), scaling.of(file, module, rank))


# -- the fused experts of transformers 5 ------------------------------------------------------------------------------


def _is_fused(module: str, config: ModelConfig) -> bool:
    match = _FUSED.fullmatch(module)
    return config.family == "mixtral" and match is not None and int(match["layer"]) < config.num_layers


def _place_fused(
    file: Path, module: str, a: np.ndarray, b: np.ndarray, modules: dict[str, Piece], config: ModelConfig, scaling: PeftScaling
) -> list[tuple[Piece, LowRank]]:
    """The updates of all experts of a layer from one adapter of PEFT over a stacked parameter.

    A [experts * rank, in] has the experts outermost in its rows, B [out, rank * experts] has them innermost in its columns. The names
    do not say which parameter it is (`base_layer` is the one that was wrapped first), the shapes do.
    """
    experts, width, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    match = _FUSED.fullmatch(module)
    assert match is not None
    rank, rest = divmod(a.shape[0], experts)
    parameters = {(2 * width, hidden): "gate_up_proj", (hidden, width): "down_proj"}
    parameter = parameters.get((b.shape[0], a.shape[1]))
    if parameter is None or rest or b.shape[1] != a.shape[0]:
        raise UserError(
            f"{file}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} do not fit: expected, with {experts} experts, "
            f"[{experts} * rank, {hidden}] and [{2 * width}, rank * {experts}] for gate_up_proj, or [{experts} * rank, {width}] and "
            f"[{hidden}, rank * {experts}] for down_proj; it is an adapter of another model"
        )
    scale = scaling.of(file, f"{match['experts']}.{parameter}", rank)
    a_by_expert, b_by_expert = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts)
    halves = {"w1": slice(0, width), "w3": slice(width, 2 * width)} if parameter == "gate_up_proj" else {"w2": slice(None)}
    return [
        (
            modules[f"model.layers.{match['layer']}.block_sparse_moe.experts.{expert}.{name}"],
            LowRank(f"{match['experts']}.{parameter}", a_by_expert[expert], b_by_expert[rows, :, expert], scale),
        )
        for expert in range(experts)
        for name, rows in halves.items()
    ]
