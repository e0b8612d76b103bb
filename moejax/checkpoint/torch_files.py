"""Reads published PyTorch checkpoints: Hugging Face directories of safetensors, one file or sharded, of every family.

What cannot be read exactly (quantised weights, pickles, other architectures) is refused by name before any weight is read; a
tensor that is missing, unexpected or of the wrong shape is an error too, so that no weight is ever left at its initial value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.names import import_tensors, list_sources
from moejax.checkpoint.safetensors_file import DTYPES, Tensor, read_header, read_tensor_into
from moejax.config import ModelConfig, UserError
from moejax.families import FAMILIES, get_family
from moejax.families.family import Family, NameTable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Tables of the rotary embedding that old versions wrote beside the weights; they follow from rope_theta.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
QUANTISERS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
}
UNQUANTISED = "moejax reads unquantised safetensors (float32, bfloat16, float16): use the original checkpoint of this model"


def refuse_foreign_files(directory: Path) -> None:
    """Raises UserError, by name, where the files of `directory` are of a kind that is not read: GGUF, adapters, pickles, quantised."""
    names = sorted(path.name for path in directory.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        for name, method in (("quant_config.json", "AWQ"), ("quantize_config.json", "GPTQ")):
            if name in names:
                raise UserError(f"{directory} is a {method} checkpoint (it has {name}); {UNQUANTISED}")
        if "adapter_config.json" in names and "config.json" not in names:
            raise UserError(f"{directory} holds a LoRA adapter (adapter_config.json), no model; give the directory of its base model")
        return
    for pattern, what in (
        (r".*\.gguf", f"a GGUF checkpoint; {UNQUANTISED}"),
        (
            r"pytorch_model.*\.bin",
            "a checkpoint of PyTorch pickles, which can run any program when loaded and are not read; save it as safetensors with "
            "transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
        ),
    ):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            raise UserError(f"{directory} holds {found[0]}: it is {what}")


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The values of `directory`/config.json, once it is sure that the checkpoint is of a kind that can be read.

    Raises UserError for GGUF, pickles, adapters, quantised weights, other architectures, and a missing or damaged config.json.
    """
    refuse_foreign_files(directory)
    path = directory / "config.json"
    values = read_json(path, f"{directory} has no config.json beside its weights; download the whole directory of the model")
    quantisation = values.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else quantisation
        name = QUANTISERS.get(str(method).lower(), str(method))
        raise UserError(f"{path}: quantization_config says that the weights are quantised by {name}; {UNQUANTISED}")
    _find_family(values, path)
    return values


def _find_family(values: dict[str, Any], path: Path) -> Family:
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    for family in FAMILIES.values():
        if kind == family.name or (kind is None and family.architecture in architectures):
            return family
    supported = " and ".join(f"{family.name} ({family.architecture})" for family in FAMILIES.values())
    shown = ", ".join(map(str, architectures)) or "no architectures"
    raise UserError(f"{path}: model_type is {kind!r} ({shown}); moejax reads {supported}")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError, naming it, where it is damaged, and with the message `missing` where it is not there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); it is damaged, copy or download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, expected a JSON object; it is damaged, copy or download it again")
    return values


class TensorFiles:
    """The tensors of a checkpoint directory by key, read only when asked for, by any thread; a context manager that closes the files."""

    def __init__(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        self.directory = directory
        self.tensors = tensors
        self._handles: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def dtype(self, key: str) -> np.dtype:
        """The numpy dtype of a tensor. Raises UserError for one that is no unquantised floating point."""
        tensor = self.tensors[key]
        if tensor.dtype not in DTYPES:
            what = " (FP8)" if tensor.dtype.startswith("F8") else ""
            raise UserError(f"{tensor.file}: tensor {key} is of dtype {tensor.dtype}{what}; {UNQUANTISED}")
        return DTYPES[tensor.dtype]

    def read_into(self, key: str, source_index: tuple[int | slice, ...], out: np.ndarray) -> None:
        """Fills `out` with the part `source_index` of tensor `key` (all of it where empty), in `out`'s dtype."""
        tensor = self.tensors[key]
        with self._opening:
            if tensor.file not in self._handles:
                self._handles[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        read_tensor_into(self._handles[tensor.file], tensor, source_index, out)

    def read(self, key: str) -> np.ndarray:
        """A whole tensor, as a fresh array."""
        out = np.empty(self.tensors[key].shape, self.dtype(key))
        self.read_into(key, (), out)
        return out


def open_tensors(directory: Path) -> TensorFiles:
    """Opens the safetensors files of `directory`: those of model.safetensors.index.json, else model.safetensors.

    Only headers are read. Raises UserError for an index that is damaged or points outside the directory, missing shards, truncated
    files, and tensors that are not where the index says.
    """
    if (directory / INDEX).exists():
        return TensorFiles(directory, _read_sharded(directory))
    if (directory / SINGLE).exists():
        return TensorFiles(directory, read_header(directory / SINGLE))
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"it has {', '.join(shards[:3])}{', ...' if len(shards) > 3 else ''}" if shards else "it has no safetensors file"
    raise UserError(f"{directory} has neither {INDEX} nor {SINGLE} ({found}); download the whole directory of the model")


def _read_sharded(directory: Path) -> dict[str, Tensor]:
    index = directory / INDEX
    places = read_json(index, f"{index} is missing").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; it is damaged, copy or download it again")
    names = sorted(set(places.values()))
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise UserError(
                f"{index} places tensors in {name!r}; expected the plain name of a safetensors file beside it; it cannot be trusted"
            )
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise UserError(f"{directory} lacks {shorten(missing)} of the {len(names)} files that {INDEX} names; download them again")
    headers = {name: read_header(directory / name) for name in names}
    absent = [key for key, name in places.items() if key not in headers[name]]
    if absent:
        raise UserError(f"{index} places {shorten(absent)} in files that do not hold them; index and files are of different checkpoints")
    strays = [key for name, header in headers.items() for key in header if places.get(key) != name]
    if strays:
        raise UserError(f"{directory}: its files hold {shorten(strays)}, unknown to {INDEX}; index and files are of different checkpoints")
    return {key: headers[name][key] for key, name in places.items()}


def shorten(names: list[str], limit: int = 3) -> str:
    """A few names, and how many there are."""
    return f"{len(names)} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"


def read_model_config(directory: Path, dtype: str | None = None) -> ModelConfig:
    """The ModelConfig of a published checkpoint, from config.json and the tensors' headers.

    The number of kv heads is that of the key projections (Arctic's config.json says 8 of weights with 56, or the reverse). dtype
    None computes and stores in the dtype that most of the weights have; otherwise in `dtype`.
    """
    values = read_hf_config(directory)
    path = directory / "config.json"
    family = _find_family(values, path)
    config = family.config_from_hf(values, str(path))
    with open_tensors(directory) as files:
        key = files.tensors.get(family.tables[0].sources["attention/key/kernel"].key.format(l=0))
        if family.name == "arctic" and key is not None and key.shape[0] % config.head_width == 0 and key.shape[0] > 0:
            config = dataclasses.replace(config, num_kv_heads=key.shape[0] // config.head_width)
        return settle_dtype(config, files, dtype)


def settle_dtype(config: ModelConfig, files: TensorFiles, dtype: str | None) -> ModelConfig:
    """`config` computing and storing in `dtype`, or (None) in the dtype that most of the weights in `files` have."""
    if dtype is None:
        dtype = _commonest_dtype(files)
        if dtype == "float64":
            raise UserError(f"{files.directory}: its weights are float64, in which moejax does not compute; load them as float32 (dtype)")
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _commonest_dtype(files: TensorFiles) -> str:
    sizes: Counter[str] = Counter()
    for key, tensor in files.tensors.items():
        if not IGNORED.fullmatch(key):
            sizes[files.dtype(key).name] += math.prod(tensor.shape)
    if not sizes:
        raise UserError(f"{files.directory} holds no weights; download the whole directory of the model")
    return sizes.most_common(1)[0][0]


def read_parameters(directory: Path, config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """The parameter tree of a published checkpoint as nested dicts of numpy arrays, in `dtype` or (None) in that of the file.

    Memory is that of the tree: every tensor is read straight into its place. Raises UserError, listing a few and counting all,
    for missing, unexpected and wrong-shaped tensors.
    """
    with open_tensors(directory) as files:
        return read_parameters_from(files, config, dtype)


def read_parameters_from(files: TensorFiles, config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """What `read_parameters` gives, from files that are open, in any layout of the family."""
    table = choose_table(get_family(config.family), config, files)
    check_tensors(config, table, files)

    def dtype_of(path: tuple[str, ...], keys: list[str]) -> np.dtype:
        if dtype is not None:
            return np.dtype(jnp.dtype(dtype))
        found = sorted({files.dtype(key).name for key in keys})
        return np.dtype(jnp.result_type(*found)) if len(found) > 1 else files.dtype(keys[0])

    return import_tensors(config, table, files.read_into, dtype_of)


def choose_table(family: Family, config: ModelConfig, files: TensorFiles) -> NameTable:
    """The layout of `family` that most of the tensors in `files` belong to."""
    return max(family.tables, key=lambda table: len(files.tensors.keys() & list_sources(config, table).keys()))


def check_tensors(config: ModelConfig, table: NameTable, files: TensorFiles) -> None:
    """Raises UserError unless `files` hold exactly the tensors of a model of `config`, each with its shape and a dtype that is read."""
    expected = list_sources(config, table)
    head, embedding = table.sources["head/kernel"].key, table.sources["embed/embedding"].key
    ignored = {key for key in files.tensors if IGNORED.fullmatch(key)}
    if config.tie_embeddings and {head, embedding} <= files.tensors.keys():
        if not np.array_equal(files.read(head), files.read(embedding)):
            raise UserError(f"{files.directory}: tie_word_embeddings is true, but {head} differs from {embedding}; set it to false")
        ignored.add(head)
    for key in files.tensors.keys() - ignored:
        files.dtype(key)
    missing = [key for key in expected if key not in files.tensors]
    unexpected = [key for key in files.tensors if key not in expected and key not in ignored]
    wrong = [
        f"{key} {list(files.tensors[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in files.tensors and files.tensors[key].shape != shape
    ]
    problems = [
        f"{shorten(names)} {verb}"
        for names, verb in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of the wrong shape"))
        if names
    ]
    if problems:
        raise UserError(
            f"{files.directory}: its tensors are not those of its configuration ({config.family}, {config.num_layers} layers, "
            f"{config.num_experts} experts, layout {table.name!r}): {'; '.join(problems)}"
        )
