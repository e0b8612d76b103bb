"""Slices of TPUs that are not there and that no compiler knows of: devices with coordinates, and meshes over them."""

import itertools
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from moejax.planning.chips import CHIPS
from moejax.planning.topology import Topology


@dataclass(frozen=True)
class Device:
    """What the model reads of a device."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU"


def make_topology(name: str) -> Topology:
    """The topology of a name as 2*v5p:2x2x4; devices slice by slice, the last dimension running fastest, two on a tpu7x chip."""
    slices, _, rest = name.rpartition("*")
    kind, _, sizes = rest.partition(":")
    shape, chip = tuple(int(size) for size in sizes.split("x")), CHIPS[kind]
    places = itertools.product(range(int(slices or 1)), itertools.product(*map(range, shape)), range(chip.devices_per_chip))
    devices = [Device(number, (*place, 0)[:3], core, part) for number, (part, place, core) in enumerate(places)]
    return Topology(name, tuple(devices), chip, shape, int(slices or 1))


def make_mesh(topology: Topology, **sizes: int) -> Mesh:
    """A mesh over a topology's devices in their order."""
    return Mesh(np.array(topology.devices, dtype=object).reshape(tuple(sizes.values())), tuple(sizes))
