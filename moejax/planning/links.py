"""Collectives: among which devices, over which links, how many bytes, how long. Formulas of "How to Scale Your Model" (Austin et al. 2025,
chapter "Sharded Matrices"), with the (n - 1) / n that it leaves out:

    all-gather, reduce-scatter   V (1 - 1/n) / (sum of the dimensions' bandwidth), V the whole array on the gathered side
    all-reduce                   twice that
    all-to-all                   the slowest dimension: b n / 8 over one link of a ring, b n / 4 of a line, b the bytes of one device
    collective-permute           b over one link

A ring's bandwidth is that of two links, a line's of one, as what comes from one end must reach the other. A dimension of which a group
has every s-th chip only shares its links with s - 1 other groups. A step to the next chip takes HOP_SECONDS. Groups that span slices are
as fast as the data centre's network lets a chip be.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from moejax.planning.chips import HOP_SECONDS
from moejax.planning.program import Instruction
from moejax.planning.topology import Topology

KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


@dataclass(frozen=True)
class Span:
    """One physical dimension of a group: its chips along it, every how many-th, and whether they close a ring."""

    dimension: int
    size: int
    stride: int
    is_ring: bool

    @property
    def links(self) -> float:
        """One-way links at a chip's disposal along this dimension."""
        return (2.0 if self.is_ring else 1.0) / self.stride


@dataclass(frozen=True)
class Group:
    """The devices that take part in one instance of a collective: axes of the mesh that tell them apart, and where they lie."""

    size: int
    axes: tuple[str, ...]
    spans: tuple[Span, ...]
    crosses_slices: bool = False
    on_chip: int = 1  # devices of the group that share a chip


def find_group(members: Sequence[int], mesh: Mesh, topology: Topology) -> Group:
    """The group of these positions in the mesh's order of devices."""
    devices = [mesh.devices.flat[member] for member in members]
    shape = tuple(mesh.shape.values())
    places = [_unravel(member, shape) for member in members]
    axes = tuple(name for number, name in enumerate(mesh.axis_names) if len({place[number] for place in places}) > 1)
    if topology.chip is None or not hasattr(devices[0], "coords"):
        return Group(len(members), axes, ())
    slices = {getattr(device, "slice_index", 0) for device in devices}
    coordinates = [tuple(device.coords) for device in devices]
    spans = []
    for dimension in range(len(topology.shape)):
        along = sorted({place[dimension] for place in coordinates})
        if len(along) > 1:
            stride = min(after - before for before, after in itertools.pairwise(along))
            closes = len(along) * stride == topology.shape[dimension] and topology.is_ring(dimension)
            spans.append(Span(dimension, len(along), stride, closes))
    return Group(len(members), axes, tuple(spans), len(slices) > 1, len(members) // max(len(set(coordinates)) * len(slices), 1) or 1)


def _unravel(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    places = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        places.append(rest)
    return tuple(reversed(places))


def kind_of(opcode: str) -> str | None:
    """The collective that an opcode is, or begins; None for all others."""
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def transfer_seconds(kind: str, bytes_moved: float, group: Group, topology: Topology) -> float:
    """Modelled seconds of one collective. `bytes_moved` as in `moved_bytes`. 0 where nothing is known of the links."""
    if topology.chip is None or group.size < 2:
        return 0.0
    chip, size = topology.chip, group.size
    share = bytes_moved * (1 - 1 / size)
    if group.crosses_slices:
        factor = 2.0 if kind == "all-reduce" else 1.0
        # Within a slice first, then each chip's part between slices.
        across = factor * bytes_moved / max(size // topology.slices, 1) / chip.network_bytes_per_second
        within = transfer_seconds(kind, bytes_moved, Group(max(size // topology.slices, 1), group.axes, group.spans), topology)
        return within + across
    hops = HOP_SECONDS * sum(span.size / (2 if span.is_ring else 1) for span in group.spans)
    if not group.spans:  # two devices of one chip
        return share / (chip.link_bytes_per_second * chip.links)
    if kind in ("all-to-all", "ragged-all-to-all"):
        loads = (bytes_moved * span.size * span.stride / (8 if span.is_ring else 4) for span in group.spans)
        return max(loads) * group.on_chip / chip.link_bytes_per_second + hops
    if kind == "collective-permute":
        return bytes_moved / chip.link_bytes_per_second + hops
    seconds = share / (chip.link_bytes_per_second * sum(span.links for span in group.spans)) + hops
    return 2 * seconds if kind == "all-reduce" else seconds


def moved_bytes(kind: str, instruction: Instruction, operand_bytes: float) -> float:
    """The array that counts: gathered, or to be scattered, summed or exchanged, in bytes of one device."""
    if kind == "all-gather":
        return float(max(shape.bytes for shape in instruction.shapes)) if len(instruction.shapes) < 3 else float(_largest(instruction))
    return float(operand_bytes)


def _largest(instruction: Instruction) -> int:
    return max(shape.bytes for shape in instruction.shapes)


_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:\([^)]*\))?\s*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+(?:,\d+)*)\]<=\[(\d+(?:,\d+)*)\](?:T\((\d+(?:,\d+)*)\))?")
_LIST = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


def first_group(attributes: str, devices: int) -> list[int]:
    """Positions of the first group's devices, of the ways in which XLA writes groups; all devices where it names none."""
    if found := _PAIRS.search(attributes):
        return [int(found[1]), int(found[2])]
    if found := _LIST.search(attributes):
        return [int(member) for member in found[1].split(",")]
    if found := _MESH.search(attributes):
        sizes = {name.strip(" '"): int(size) for name, size in (part.split("=") for part in found[1].split(","))}
        chosen = {name.strip(" '") for name in found[2].split(",")}
        strides, stride = {}, 1
        for name in reversed(sizes):
            strides[name], stride = stride, stride * sizes[name]
        members = [0]
        for name in sizes:
            if name in chosen:
                members = [member + place * strides[name] for member in members for place in range(sizes[name])]
        return members
    if found := _IOTA.search(attributes):
        return _iota_group(*(tuple(int(size) for size in (part or "").split(",") if size) for part in found.groups()))
    return list(range(devices))


def _iota_group(groups: tuple[int, ...], reshape: tuple[int, ...], transpose: tuple[int, ...]) -> list[int]:
    order = transpose or tuple(range(len(reshape)))
    strides = [math.prod(reshape[place + 1 :]) for place in range(len(reshape))]
    size = groups[-1]
    members = []
    for number in range(size):
        rest, member = number, 0
        for place in reversed(order):
            rest, at = divmod(rest, reshape[place])
            member += at * strides[place]
        members.append(member)
    return members


def describe_group(group: Group) -> dict[str, Any]:
    """For JSON."""
    return {
        "devices": group.size,
        "axes": list(group.axes),
        "torus": [[span.size, "ring" if span.is_ring else "line"] for span in group.spans],
    }
