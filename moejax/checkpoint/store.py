"""Our own checkpoints on disk: Orbax arrays beside one small JSON file that says what they are.

    <directory>/moejax.json    format, family, model config, step, run config, source; its presence marks a complete checkpoint
    <directory>/manifest.json  size and checksum of every file, compared whenever the checkpoint is read
    <directory>/params/        the parameters, in the stacked tree of moejax/families/layout.py
    <directory>/optimizer/     the optimiser's state, where it was saved
    <directory>/...            whatever the caller adds (tokenizer, data position)

A checkpoint is written beside its final name and renamed into place, so that no half-written one is ever seen. The checkpoints of
a run lie in <run>/checkpoints/<step, 8 digits>/.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.arrays import begin_arrays, describe_arrays, first_device, restore_arrays
from moejax.checkpoint.atomic import remove_directory
from moejax.checkpoint.manifest import METADATA, DamagedCheckpoint, check_files, holds_checksum, read_sealed, write_manifest
from moejax.checkpoint.processes import write_together
from moejax.config import ModelConfig, UserError, model_from_json, to_json
from moejax.families.layout import ROUTER_BIAS, abstract_parameters, flatten_leaves, insert_leaf

FORMAT = 1
PARAMS = "params"
OPTIMIZER = "optimizer"
STEPS = "checkpoints"
SET_ASIDE = "damaged-"


@dataclass(frozen=True)
class Metadata:
    """What moejax.json says of a checkpoint.

    `run` is the run's configuration as `moejax.config.to_json` wrote it; `rows_read` the number of rows that it has trained on, `random`
    the seed and the step that any random key of it is folded from. `source` is what a converted one was made from: name, layout,
    and files with their sizes and SHA-256. `manifest` is the size and checksum of manifest.json.
    """

    config: ModelConfig
    step: int | None
    run: dict[str, Any] | None
    source: dict[str, Any] | None
    manifest: dict[str, Any]
    rows_read: int | None = None
    random: dict[str, int] | None = None


def save(directory: str | Path, params: Mapping[str, Any], config: ModelConfig, **what: Any) -> None:
    """Writes a checkpoint and returns when it is on the disk. Arguments and errors are those of `begin_save`."""
    begin_save(directory, params, config, **what)()


def begin_save(
    directory: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    optimizer: Any = None,
    step: int | None = None,
    rows_read: int | None = None,
    random: dict[str, int] | None = None,
    run: dict[str, Any] | None = None,
    write_extra: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Callable[[], None]:
    """Begins to write a checkpoint, and returns a function that must be called, in any thread, and returns when it is on the disk.

    `directory` is complete or as it was, whatever happens; jax arrays may be donated as soon as this returns. `params` is the stacked
    tree (numpy or jax arrays, sharded or not); `optimizer` any tree of arrays; `write_extra` is called, by the returned function, with
    the directory being written and adds files to it. Where there are several processes, all of them call this and what it returns: each
    writes its shards, the first one all else.

    Raises UserError for an existing `directory` (unless `overwrite`), for a tree that is not that of `config`, and for a disk without
    room; the returned function raises it where the disk fills while writing.
    """
    directory = Path(directory).absolute()
    refuse_existing(directory, overwrite)
    _check_tree(directory, dict(params), config)
    optimizer_leaves = {} if optimizer is None else _name_leaves(optimizer)
    needed = _count_bytes(params) + _count_bytes(optimizer_leaves) + 1_000_000
    with contextlib.ExitStack() as opened:
        temporary = opened.enter_context(write_together(directory, needed))
        trees = {temporary / PARAMS: dict(params)} | ({temporary / OPTIMIZER: optimizer_leaves} if optimizer_leaves else {})
        wait = begin_arrays(trees)
        rest = opened.pop_all()

    def finish() -> None:
        with rest:
            wait()
            if jax.process_index() == 0:
                if write_extra is not None:
                    write_extra(temporary)
                write_manifest(temporary, describe_checkpoint(config, step=step, rows_read=rows_read, random=random, run=run))

    return finish


def refuse_existing(directory: Path, overwrite: bool) -> None:
    """Raises UserError where `directory` may not be written: it exists and is not to be overwritten, or is no checkpoint."""
    if directory.exists() and not overwrite:
        raise UserError(f"{directory} exists already; give another path, or remove it first")
    if directory.exists() and not (directory / METADATA).exists():
        raise UserError(f"{directory} exists and is no checkpoint of moejax; it is not overwritten, give another path")


def describe_checkpoint(
    config: ModelConfig,
    *,
    step: int | None = None,
    rows_read: int | None = None,
    random: dict[str, int] | None = None,
    run: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of a moejax.json, but for its checksums."""
    position = {"step": step, "rows_read": rows_read, "random": random}
    return {"format": FORMAT, "family": config.family, "model": to_json(config), **position, "run": run, "source": source}


def read_metadata(directory: str | Path) -> Metadata:
    """What `directory`/moejax.json says. Raises DamagedCheckpoint where it is missing or damaged, UserError where it is newer than this."""
    path = Path(directory) / METADATA
    try:
        text = path.read_bytes()
        version = json.loads(text)["format"]
        if version == FORMAT or holds_checksum(text):
            values = read_sealed(path)  # first: a flipped bit may have made another version of it
        if version == FORMAT:
            config = model_from_json(values["model"], str(path))
            position = values.get("rows_read"), values.get("random")  # younger than some checkpoints
            return Metadata(config, values["step"], values["run"], values["source"], values["manifest"], *position)
    except FileNotFoundError:
        raise DamagedCheckpoint(Path(directory), f"has no {METADATA}: it is no checkpoint of moejax, or not a complete one") from None
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read ({error.strerror})") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(path, f"is damaged ({type(error).__name__}: {error})") from error
    raise UserError(f"{path} is of format {version!r}, this version of moejax reads {FORMAT}; update moejax")


def verify(directory: str | Path, inside: str | None = None) -> None:
    """Raises DamagedCheckpoint, naming the file, unless the checkpoint is as it was written; reads all of it, or the folder `inside`.

    Where several processes read one checkpoint, each reads its share; each raises for its own share.
    """
    directory = Path(directory).absolute()
    check_files(directory, read_metadata(directory).manifest, inside, (jax.process_index(), jax.process_count()))


def restore_params(
    directory: str | Path, config: ModelConfig, dtype: str | None = None, sharding: Any = None, *, verify: bool = True
) -> dict[str, Any]:
    """The parameter tree of a checkpoint, as jax arrays, in `dtype` (the biases of routers always in float32) or (None) as saved.

    `sharding` is one jax.sharding.Sharding for all leaves or a tree of them, and each leaf is read straight into it, by each process
    its own parts; None puts everything on the first local device. `verify` compares the files with their checksums first, which
    reads them once more (several processes share the work). Raises UserError where the arrays are missing, damaged, or not those of
    `config`.
    """
    path = Path(directory).absolute() / PARAMS
    _verify_folder(path, verify)
    expected = flatten_leaves(abstract_parameters(config))
    stored = {name: (leaf.shape, leaf.dtype) for name, leaf in describe_arrays(path).items()}
    _check_shapes(str(path), {name: shape for name, (shape, _) in stored.items()}, config)
    shardings = flatten_leaves(sharding) if isinstance(sharding, dict) else dict.fromkeys(expected, sharding or first_device())

    def describe(name: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        shape, stored_dtype = stored[name]
        wanted = stored_dtype if dtype is None or "/".join(name).endswith(ROUTER_BIAS) else jax.numpy.dtype(dtype)
        return jax.ShapeDtypeStruct(shape, wanted, sharding=shardings[name])

    return restore_arrays(path, _nest({name: describe(name) for name in expected}))


def restore_optimizer(directory: str | Path, abstract_tree: Any, *, verify: bool = True) -> Any:
    """The optimiser's state of a checkpoint, in the structure, dtypes and shardings of `abstract_tree`; `verify` as in restore_params.

    Leaves of `abstract_tree` are jax.ShapeDtypeStruct or arrays; one without a sharding goes to the first local device. Raises
    UserError where the state is missing, damaged, or of another optimiser.
    """
    leaves, structure = jax.tree.flatten(abstract_tree)
    if not leaves:
        return abstract_tree
    path = Path(directory).absolute() / OPTIMIZER
    _verify_folder(path, verify)
    names = list(_name_leaves(abstract_tree))
    stored = {name[0]: tuple(leaf.shape) for name, leaf in describe_arrays(path).items()}
    expected = {name: tuple(np.shape(leaf)) for name, leaf in zip(names, leaves, strict=True)}
    if stored != expected:
        odd = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        raise UserError(
            f"{path} is the state of another optimiser or model: {len(odd)} of its arrays differ ({', '.join(odd[:3])}); "
            "resume with the optimiser and the model of the run"
        )
    targets = {
        name: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device())
        for name, leaf in zip(names, leaves, strict=True)
    }
    restored = restore_arrays(path, targets)
    return jax.tree.unflatten(structure, [restored[name] for name in names])


# -- the checkpoints of a run ----------------------------------------------------------------------------------------


def step_directory(run_directory: str | Path, step: int) -> Path:
    """Where a run keeps its checkpoint after `step` steps."""
    return Path(run_directory) / STEPS / f"{step:08d}"


def list_steps(run_directory: str | Path, *, also_incomplete: bool = False) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = Path(run_directory) / STEPS
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name) and (also_incomplete or (path / METADATA).exists())]
    return sorted(found, key=lambda path: int(path.name))


def latest_step(run_directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(list_steps(run_directory)), None)


def latest_metadata(run_directory: str | Path) -> Metadata | None:
    """What the newest checkpoint of a run says that says it undamaged; None where there is none. Arrays are not looked at."""
    for path in reversed(list_steps(run_directory)):
        with contextlib.suppress(DamagedCheckpoint):
            return read_metadata(path)
    return None


def prune(run_directory: str | Path, keep: int, keep_every: int = 0) -> None:
    """Removes the complete checkpoints of a run but for the `keep` newest, and those of steps that are multiples of `keep_every`."""
    for path in list_steps(run_directory)[: -keep or None]:
        if not keep_every or int(path.name) % keep_every:
            remove_directory(path)


def list_set_aside(run_directory: str | Path) -> list[Path]:
    """The damaged checkpoints that were moved out of the way; they count as none."""
    return sorted((Path(run_directory) / STEPS).glob(f"{SET_ASIDE}*"))


def set_aside(checkpoints: Sequence[Path]) -> None:
    """Moves damaged checkpoints of one run out of the way, in the place of any that were moved before, so that others may take theirs."""
    for path in list_set_aside(checkpoints[0].parent.parent):
        remove_directory(path)
    for path in checkpoints:
        path.rename(path.with_name(SET_ASIDE + path.name))


def _verify_folder(path: Path, wanted: bool) -> None:
    if not path.is_dir():
        raise DamagedCheckpoint(path.parent, f"has no {path.name}/ with the saved arrays")
    if wanted:
        verify(path.parent, path.name)


# -- trees ------------------------------------------------------------------------------------------------------------


def _nest(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        insert_leaf(tree, path, value)
    return tree


def _name_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by path, in its order: an optimiser's state is then saved apart from its library's classes."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the optimiser's state have the same path")
    return leaves


def _count_bytes(tree: Any) -> int:
    return sum(int(getattr(leaf, "nbytes", 8)) for leaf in jax.tree.leaves(tree))


def _check_tree(directory: Path, params: dict[str, Any], config: ModelConfig) -> None:
    shapes = {name: np.shape(leaf) for name, leaf in flatten_leaves(params).items()}
    _check_shapes(f"the parameters to save in {directory}", shapes, config)


def _check_shapes(what: str, shapes: Mapping[tuple[str, ...], tuple[int, ...]], config: ModelConfig) -> None:
    """Raises UserError unless `shapes` are those of a model of `config`."""
    expected = {name: leaf.shape for name, leaf in flatten_leaves(abstract_parameters(config)).items()}
    odd = sorted(
        name for name in expected.keys() | shapes.keys() if tuple(shapes.get(name, ())) != expected.get(name) or name not in shapes
    )
    if odd:
        name = odd[0]
        got = list(shapes[name]) if name in shapes else "nothing"
        wanted = list(expected[name]) if name in expected else "nothing"
        raise UserError(
            f"{what}: {len(odd)} arrays are not those of the model config ({config.family}, {config.num_layers} layers, "
            f"hidden_size {config.hidden_size}): {'/'.join(name)} is {got}, expected {wanted}; is it a checkpoint of another model?"
        )
