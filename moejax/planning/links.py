"""Collectives: among which devices, over which links, how many bytes, how long. Formulas of "How to Scale Your Model" (Austin et al. 2025,
chapter "Sharded Matrices"), with the (n - 1) / n that it leaves out:

    all-gather, reduce-scatter   V (1 - 1/n) / (sum of the dimensions' bandwidth), V the whole array on the gathered side
    all-reduce                   twice that
    all-to-all                   the slowest dimension: b n / 8 over one link of a ring, b n / 4 of a line, b the bytes of one chip
    collective-permute           b times the messages that pass the busiest link

A ring's bandwidth is that of two links, a line's of one, as what comes from one end must reach the other. A dimension of which a group
has every s-th chip only shares its links with s - 1 other groups; a chip of two devices shares them with its other device's group. A step
to the next chip takes HOP_SECONDS. Between slices all goes first within them, then over the data centre's network, as fast as it lets a
chip be.
"""

import collections
import dataclasses
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
    slices: int = 1  # over which its devices are spread
    on_chip: int = 1  # devices of the group that share a chip
    messages: int = 1  # of a permutation: over its busiest link
    steps: int = 1  # of a permutation: from chip to chip, of the longest way


def find_group(members: Sequence[int], mesh: Mesh, topology: Topology) -> Group:
    """The group of these positions in the mesh's order of devices."""
    devices = [mesh.devices.flat[member] for member in members]
    shape = tuple(mesh.shape.values())
    places = [_unravel(member, shape) for member in members]
    axes = tuple(name for number, name in enumerate(mesh.axis_names) if len({place[number] for place in places}) > 1)
    if topology.chip is None or not hasattr(devices[0], "coords"):
        return Group(len(members), axes, ())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    coordinates = [tuple(device.coords) for device in devices]
    spans = []
    for dimension in range(len(topology.shape)):
        along = sorted({place[dimension] for place in coordinates})
        if len(along) > 1:
            stride = min(after - before for before, after in itertools.pairwise(along))
            closes = len(along) * stride == topology.shape[dimension] and topology.is_ring(dimension)
            spans.append(Span(dimension, len(along), stride, closes))
    chips = len(set(coordinates)) * slices
    return Group(len(members), axes, tuple(spans), slices, max(len(members) // chips, 1))


def find_permutation(pairs: Sequence[tuple[int, int]], mesh: Mesh, topology: Topology) -> Group:
    """The group of the pair that lies farthest apart, with the messages that pass the busiest link when all pairs send at once.

    Each message goes along one dimension after another, the shorter way round a ring.
    """
    groups = [find_group(pair, mesh, topology) for pair in pairs]
    farthest = max(groups, key=lambda group: (group.slices, sum(span.stride for span in group.spans)))
    if topology.chip is None or not farthest.spans:
        return farthest
    load, steps = collections.Counter(), 0
    for group, pair in zip(groups, pairs, strict=True):
        if group.slices > 1:
            continue
        place, goal = (list(mesh.devices.flat[member].coords) for member in pair)
        route = []
        for dimension, size in enumerate(topology.shape):
            ahead = (goal[dimension] - place[dimension]) % size
            step = (1 if ahead <= size / 2 else -1) if topology.is_ring(dimension) else (1 if goal[dimension] > place[dimension] else -1)
            while place[dimension] != goal[dimension]:
                route.append((*place, dimension, step))
                place[dimension] = (place[dimension] + step) % size
        load.update(route)
        steps = max(steps, len(route))
    return dataclasses.replace(farthest, messages=max(load.values(), default=1), steps=steps)


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
    if group.slices > 1:
        return _across_slices(kind, bytes_moved, group, topology)
    chip, times = topology.chip, 2.0 if kind == "all-reduce" else 1.0
    share = bytes_moved * (1 - 1 / group.size)
    if not group.spans:  # two devices of one chip, between which as much goes as over all its links
        return times * share / (chip.link_bytes_per_second * chip.links)
    if kind == "collective-permute":
        return group.messages * bytes_moved / chip.link_bytes_per_second + HOP_SECONDS * group.steps
    hops = HOP_SECONDS * sum(span.size / 2 if span.is_ring else span.size - 1 for span in group.spans)
    if kind in ("all-to-all", "ragged-all-to-all"):
        loads = (bytes_moved * span.size * span.stride / (8 if span.is_ring else 4) for span in group.spans)
        return max(loads) * chip.devices_per_chip / chip.link_bytes_per_second + hops
    sharing = chip.devices_per_chip / group.on_chip  # the chip's other devices send as much, if not for the same group
    return times * (share * sharing / (chip.link_bytes_per_second * sum(span.links for span in group.spans)) + hops)


def _across_slices(kind: str, bytes_moved: float, group: Group, topology: Topology) -> float:
    """A collective between slices: of what is gathered or summed each chip carries its part over the network, of an exchange all."""
    assert topology.chip is not None
    inside = group.size // group.slices
    away = bytes_moved * (1 - 1 / group.slices)
    network = topology.chip.network_bytes_per_second
    if kind == "collective-permute":
        return bytes_moved / network
    within = transfer_seconds(kind, bytes_moved, dataclasses.replace(group, size=inside, slices=1), topology)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return within + away / network
    return within + (2.0 if kind == "all-reduce" else 1.0) * away / inside / network


def moved_bytes(kind: str, instruction: Instruction, operands: Sequence[float]) -> float:
    """The array that counts: gathered, or to be scattered, summed or exchanged, in bytes of one device; several arrays together.

    `operands`: bytes of each. Of a ragged exchange the smaller of what rows come from and go to: the larger is a buffer with room to spare.
    """
    if kind == "all-gather":
        # What begins one names what goes in beside what comes out.
        return float(instruction.bytes - (sum(operands) if instruction.opcode.endswith("-start") else 0))
    return float(min(operands[:2]) if kind == "ragged-all-to-all" else sum(operands))


_MESH = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*?)(?:, device_ids=\((?P<order>.*?)\))?\] *\{(?P<chosen>[^}]*)\}")
_SUB_AXIS = re.compile(r"(?P<name>.*?)(?::\((?P<before>\d+)\)(?P<size>\d+))?")
_IOTA = re.compile(r"replica_groups=\[(\d+(?:,\d+)*)\]<=\[(\d+(?:,\d+)*)\](?:T\((\d+(?:,\d+)*)\))?")
_LIST = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


def find_pairs(attributes: str) -> list[tuple[int, int]]:
    """Senders and receivers of a collective-permute, by position."""
    found = _PAIRS.search(attributes)
    return [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", found[1])] if found else []


def first_group(attributes: str, devices: int) -> list[int]:
    """Positions of the first group's devices, of the ways in which XLA writes groups; all devices where it names none."""
    if found := _LIST.search(attributes):
        return [int(member) for member in found[1].split(",")]
    if found := _MESH.search(attributes):
        members = _mesh_group(found["axes"], found["chosen"])
        return [_mesh_order(found["order"])[member] for member in members] if found["order"] else members
    if found := _IOTA.search(attributes):
        return _iota_group(*(tuple(int(size) for size in (part or "").split(",") if size) for part in found.groups()))
    return list(range(devices))


def _mesh_group(axes: str, chosen: str) -> list[int]:
    """The first group of mesh['x'=8,'y'=4] {'x','y':(2)2}: along x, and along the part of y that has 2 before it and 2 of its own."""
    sizes = {name.strip(" '"): int(size) for name, size in (part.split("=") for part in axes.split(","))}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name], stride = stride, stride * sizes[name]
    members = [0]
    for part in chosen.split(","):
        axis = _SUB_AXIS.fullmatch(part.replace("'", "").strip())
        assert axis is not None
        size, step = sizes[axis["name"]], strides[axis["name"]]
        if axis["size"]:
            step *= size // (int(axis["before"]) * int(axis["size"]))
            size = int(axis["size"])
        members = [member + place * step for member in members for place in range(size)]
    return members


def _mesh_order(order: str) -> list[int]:
    """The devices of a mesh that has them in an order of its own: [4,2]T(1,0), or all of them."""
    if found := re.fullmatch(r"\[([0-9,]+)\]T\(([0-9,]+)\)", order):
        sizes, transpose = (tuple(int(number) for number in part.split(",")) for part in found.groups())
        return _iota_group((math.prod(sizes),), sizes, transpose)
    return [int(number) for number in re.findall(r"\d+", order)]


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
