"""Meshes for serving, compared before anything is compiled: what a device holds of a model, and what it must read for a token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.cache_config import CacheConfig
from moejax.config import MeshConfig, ModelConfig, UserError, divisors
from moejax.families.counts import expect_touched
from moejax.serving.abstract import abstract_cache, abstract_variables, bytes_per_device
from moejax.sharding import MESH_AXES, axis_size, check_mesh, make_mesh

_EXPERT_MODULES = ("gate", "up", "down")


@dataclass(frozen=True)
class Load:
    """Bytes of one device: what it holds, and what a decoding step must read of that."""

    weights: int
    cache: int
    read_weights: float
    read_cache: float
    spread: float  # what it would have to read of both if nothing lay on two devices

    @property
    def held(self) -> int:
        """Weights and cache."""
        return self.weights + self.cache

    @property
    def read(self) -> float:
        """Weights and cache, of a step."""
        return self.read_weights + self.read_cache


def weigh_mesh(config: ModelConfig, mesh: Mesh, batch: int, context: int, cache: CacheConfig) -> Load:
    """The Load of a mesh.

    A step reads every weight that lies on the device but the embedding's, of the experts the share that the tokens of its part of the
    batch meet under uniform routing, E (1 - (1 - A/E)^tokens), and the keys and values of `context` tokens a row. Norms and the
    embedding's rows are thousandths. Where weights are divided over fsdp this counts what lies here, not what is gathered.
    """
    variables = abstract_variables(config, mesh)
    held = abstract_cache(config, mesh, batch, context, cache)
    divided = batch % axis_size(mesh, "data", "fsdp", "expert") == 0
    rows = batch // mesh.shape["data"] if divided else batch
    touched = expect_touched(config, rows) / config.num_experts
    all_touched = expect_touched(config, batch) / config.num_experts
    read, spread = 0.0, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        names = [entry.key for entry in path]
        if names[0] == "embed" and not config.tie_embeddings:
            continue
        is_expert = "moe" in names and any(name in _EXPERT_MODULES for name in names)
        read += bytes_per_device(leaf) * (touched if is_expert else 1.0)
        spread += math.prod(leaf.shape) * leaf.dtype.itemsize * (all_touched if is_expert else 1.0)
    full = min(context / held.keys.shape[2], 1.0)
    in_cache = bytes_per_device((held.keys, held.values)) * full
    spread += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((held.keys, held.values))) * full
    return Load(bytes_per_device(variables), bytes_per_device(held), read, in_cache, spread / mesh.size)


def candidate_meshes(config: ModelConfig, devices: int) -> list[MeshConfig]:
    """Meshes of all the devices that divide heads and experts, what is left going to copies of the model (`data`). None is over fsdp:
    weights divided so would travel for every token."""
    found = []
    for tensor in divisors(math.gcd(config.num_heads, config.num_kv_heads)):
        for expert in divisors(config.num_experts if config.moe_layers else 1):
            if devices % (tensor * expert) == 0:
                found.append(MeshConfig(data=devices // (tensor * expert), fsdp=1, expert=expert, tensor=tensor))
    return found


def open_mesh(config: ModelConfig, sizes: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of these devices. Raises UserError for one that they or the model do not fit."""
    mesh = make_mesh(**{axis: getattr(sizes, axis) for axis in MESH_AXES}, devices=list(devices))
    check_mesh(config, mesh)
    return mesh


def choose_mesh(config: ModelConfig, devices: Sequence[Any], batch: int, context: int, cache: CacheConfig, hbm: float | None) -> MeshConfig:
    """Of the candidates that hold weights and cache, the one whose devices read least for a step; else the one that holds least."""
    loads = _weigh_all(config, devices, batch, context, cache)
    fitting = [one for one in loads if hbm is None or one[1].held <= hbm]
    if fitting:
        return min(fitting, key=lambda one: one[1].read)[0]
    return min(loads, key=lambda one: one[1].held)[0]


def nearest_meshes(
    config: ModelConfig, asked: Mesh, batch: int, context: int, cache: CacheConfig, room: float
) -> list[tuple[MeshConfig, Load]]:
    """The candidates whose weights and cache take at most `room` bytes of a device, the most alike first: fewest doublings of an axis."""
    loads = _weigh_all(config, list(asked.devices.flat), batch, context, cache)
    fitting = [one for one in loads if one[1].held <= room]
    return sorted(fitting, key=lambda one: (_distance(one[0], asked), one[1].held))


def _weigh_all(config: ModelConfig, devices: Sequence[Any], batch: int, context: int, cache: CacheConfig) -> list[tuple[MeshConfig, Load]]:
    found = []
    for sizes in candidate_meshes(config, len(devices)):
        try:
            mesh = open_mesh(config, sizes, devices)
        except UserError:  # slices that `data` does not span, a dispatch that keeps rows at home
            continue
        found.append((sizes, weigh_mesh(config, mesh, batch, context, cache)))
    if not found:
        raise UserError(f"no mesh of these {len(devices)} devices divides the model's heads and experts; name one with --mesh.*")
    return found


def _distance(sizes: MeshConfig, asked: Mesh) -> float:
    return sum(abs(math.log2(getattr(sizes, axis) / asked.shape[axis])) for axis in MESH_AXES)
