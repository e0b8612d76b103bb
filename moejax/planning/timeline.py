"""A compiled program's schedule walked through: how long each instruction takes by the model, what waits for which collective.

Two things go on at once: the cores run one instruction after another, and each dimension of the torus carries one collective after another.
A collective that is not asynchronous stops the cores; an asynchronous one only where its end is waited for. An instruction takes the
longest of its FLOP at the chip's peak, its bytes at HBM's bandwidth, and what the TPU compiler itself estimates for it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

from moejax.planning.arithmetic import FREE, PREFETCHES, count_bytes, count_flops
from moejax.planning.links import Group, find_group, find_pairs, find_permutation, first_group, kind_of, moved_bytes, transfer_seconds
from moejax.planning.program import Computation, Instruction, Program
from moejax.planning.topology import Topology

EXCHANGES = ("all-to-all", "ragged-all-to-all")
# Of what another computation names. Calls go to the SparseCores; newer compilers load one first (custom-call-start) and begin it later.
BEGINNINGS = ("async-start", "call-start", "custom-call-update")
SLICE_AXIS = "data"  # of the mesh, the only one that runs across slices
LONGEST_SEARCH = 64  # instructions
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_ASYNC_NAME = re.compile(r"async-collective-(start|done)(.*)")


@dataclass
class Collective:
    """A collective of the program's text; `count` says how often a step runs it. Bytes of one device and time are those of one run."""

    kind: str
    op_name: str
    count: int
    bytes: float
    group: Group
    seconds: float
    is_async: bool
    compute_between: float = 0.0  # seconds of work between start and done; 0 for one that is not asynchronous

    @property
    def hidden(self) -> float:
        """Seconds of one run that other work covers. Work that two are on their way during counts for both."""
        return min(self.seconds, self.compute_between)

    @property
    def direction(self) -> str:
        """forward, or backward (what is computed again there included); other outside of both."""
        if "transpose(" in self.op_name:
            return "backward"
        return "forward" if "jvp(" in self.op_name else "other"


@dataclass
class Timeline:
    """Totals of one step on one device."""

    seconds: float = 0.0  # predicted, end to end
    roofline_seconds: float = 0.0  # the same work and waits, with no instruction slower than peak FLOP and HBM bandwidth allow
    compute_seconds: float = 0.0  # the cores at work
    flops: float = 0.0
    flops_seconds: float = 0.0  # those at peak
    hbm_bytes: float = 0.0
    hbm_seconds: float = 0.0  # those at HBM's bandwidth
    waiting_seconds: float = 0.0  # the cores waiting for links
    collectives: list[Collective] = field(default_factory=list)

    @property
    def link_seconds(self) -> float:
        """All collectives, one after another."""
        return sum(one.count * one.seconds for one in self.collectives)

    def hidden_exchange(self, direction: str) -> float | None:
        """sum of min(link time, work between start and done) over sum of link time, of all-to-alls in a direction; None without any."""
        found = [one for one in self.collectives if one.kind in EXCHANGES and one.direction == direction]
        total = sum(one.count * one.seconds for one in found)
        return sum(one.count * one.hidden for one in found) / total if total else None


@dataclass
class _Flight:
    """An asynchronous collective on its way."""

    collective: Collective
    ends: float


class _Walk:
    """One computation's instructions in order; loops and branches are walks of their own."""

    def __init__(self, program: Program, mesh: Mesh, topology: Topology, filled: float) -> None:
        self.program, self.mesh, self.topology, self.filled = program, mesh, topology, filled
        self.timeline = Timeline()
        self.clock = 0.0
        self.free: dict[int, float] = {}  # when each dimension of the torus has nothing more to carry
        self.flights: dict[str, _Flight] = {}

    def run(self, computation: Computation) -> Timeline:
        """Totals of one run of a computation."""
        for instruction in computation.instructions:
            self.step(computation, instruction)
        for name in list(self.flights):
            self.land(name)
        self.timeline.seconds = self.clock
        return self.timeline

    def step(self, computation: Computation, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            self.land(_started_name(instruction))
        elif opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
            assert body is not None
            self.inside(self.measure(self.program.computations[body[1]]), self.program.trips(instruction))
        elif opcode in ("conditional", "call"):
            branches = [self.measure(branch) for branch in self.program.called_by(instruction)]
            self.inside(max(branches, key=lambda branch: (branch.seconds, branch.flops, branch.hbm_bytes)), 1)
        elif opcode in ("send", "recv"):
            self.begin_transfer(computation, instruction)
        elif (started := self.find_collective(computation, instruction)) is not None:
            self.take_off(instruction, *started)
        else:
            _, end = _async_part(instruction)
            if end == "done":
                self.land(_started_name(instruction))
            else:
                self.compute(computation, instruction)

    def measure(self, computation: Computation) -> Timeline:
        """A loop's body, or a branch, by itself: its links are taken to be free when it begins, and what it sends has come when it ends."""
        return _Walk(self.program, self.mesh, self.topology, self.filled).run(computation)

    def inside(self, found: Timeline, times: int) -> None:
        """A loop's body, or the branch that takes longest, run so many times."""
        self.clock += times * found.seconds
        for name in ("roofline_seconds", "compute_seconds", "flops", "flops_seconds", "hbm_bytes", "hbm_seconds", "waiting_seconds"):
            setattr(self.timeline, name, getattr(self.timeline, name) + times * getattr(found, name))
        for one in found.collectives:
            one.count *= times
        self.timeline.collectives += found.collectives
        for flight in self.flights.values():
            flight.collective.compute_between += times * found.compute_seconds

    def compute(self, computation: Computation, instruction: Instruction) -> None:
        """An instruction on the cores."""
        flops = count_flops(self.program, computation, instruction, self.filled)
        moved = count_bytes(self.program, computation, instruction)
        timeline, chip = self.timeline, self.topology.chip
        timeline.flops += flops
        timeline.hbm_bytes += moved
        if chip is None:
            return
        at_peak, at_bandwidth = flops / chip.flops_per_second, moved / chip.hbm_bytes_per_second
        timeline.flops_seconds += at_peak
        timeline.hbm_seconds += at_bandwidth
        if instruction.opcode in PREFETCHES:  # beside the cores' work
            return
        roofline = max(at_peak, at_bandwidth)
        seconds = max(roofline, (instruction.cycles or 0) / chip.clock)
        self.clock += seconds
        timeline.compute_seconds += seconds
        timeline.roofline_seconds += roofline
        for flight in self.flights.values():
            flight.collective.compute_between += seconds

    def begin_transfer(self, computation: Computation, instruction: Instruction) -> None:
        """What goes from slice to slice through the hosts; it is written as a send and a receive, of which the latter is waited for."""
        kind = _BETWEEN_SLICES.search(instruction.attributes)
        if kind is None or instruction.opcode == "send" or self.topology.slices == 1:
            return
        name, moved = kind[1].lower().replace("_", "-"), float(instruction.shapes[0].bytes)
        group = Group(self.topology.slices, (SLICE_AXIS,), (), slices=self.topology.slices)
        seconds = transfer_seconds(name, moved, group, self.topology)
        self.take_off(instruction, Collective(name, _origin(computation, instruction), 1, moved, group, seconds, True), True)

    def find_collective(self, computation: Computation, instruction: Instruction) -> tuple[Collective, bool] | None:
        """The collective that an instruction is or begins, and whether the cores go on meanwhile."""
        kind, inner, where = kind_of(instruction.opcode), instruction, computation
        is_async = instruction.opcode.endswith("-start")
        if kind is None and instruction.opcode in ("fusion", *BEGINNINGS):
            part, end = _async_part(instruction)
            begins = end == "start" or instruction.opcode in BEGINNINGS
            if part is not None and not begins:
                return None
            loaded = computation.by_name[instruction.operands[0]] if instruction.opcode == "custom-call-update" else instruction
            for called in self.program.called_by(loaded):
                for one in called.instructions:
                    if kind_of(one.opcode) is not None:
                        kind, inner, where, is_async = kind_of(one.opcode), one, called, begins
            if kind == "all-reduce" and any(one.opcode == "dynamic-slice" for one in where.instructions):
                kind = "reduce-scatter"  # so TPUs write it
            if kind is not None and not begins and "async_collective_fusion" in instruction.attributes:
                return None  # a step of one that has begun
        if kind is None:
            return None
        operands = [float(where.by_name[name].bytes) for name in inner.operands if name in where.by_name]
        if kind == "collective-permute":
            group = find_permutation(find_pairs(inner.attributes), self.mesh, self.topology)
        else:
            group = find_group(first_group(inner.attributes, self.mesh.size), self.mesh, self.topology)
        moved = moved_bytes(kind, inner, operands)
        seconds = transfer_seconds(kind, moved, group, self.topology)
        return Collective(kind, inner.op_name or _origin(computation, instruction), 1, moved, group, seconds, is_async), is_async

    def take_off(self, instruction: Instruction, collective: Collective, is_async: bool) -> None:
        """A collective begins, as soon as its links are free."""
        self.timeline.collectives.append(collective)
        dimensions = [span.dimension for span in collective.group.spans] or [-1]
        starts = max([self.clock, *(self.free.get(dimension, 0.0) for dimension in dimensions)])
        ends = starts + collective.seconds
        self.free.update(dict.fromkeys(dimensions, ends))
        if is_async:
            self.flights[instruction.name] = _Flight(collective, ends)
        else:
            self.timeline.waiting_seconds += ends - self.clock
            self.timeline.roofline_seconds += ends - self.clock
            self.clock = ends

    def land(self, name: str) -> None:
        """The cores wait for a collective that is on its way; nothing where none of that name is."""
        flight = self.flights.pop(name, None)
        if flight is not None and flight.ends > self.clock:
            self.timeline.waiting_seconds += flight.ends - self.clock
            self.timeline.roofline_seconds += flight.ends - self.clock
            self.clock = flight.ends


def _origin(computation: Computation, instruction: Instruction) -> str:
    """The path of the jax operation that an instruction came from; where the compiler lost it, that of what it works on."""
    waiting, seen = [instruction], set()
    while waiting and len(seen) < LONGEST_SEARCH:
        one = waiting.pop(0)
        if one.op_name:
            return one.op_name
        seen.add(one.name)
        waiting += [computation.by_name[name] for name in one.operands if name in computation.by_name and name not in seen]
    return ""


def _async_part(instruction: Instruction) -> tuple[str | None, str]:
    """('.14', 'start') of %async-collective-start.14; (None, '') of what has no such name."""
    found = _ASYNC_NAME.fullmatch(instruction.name)
    return (found[2], found[1]) if found else (None, "")


def _started_name(instruction: Instruction) -> str:
    """The name of the instruction that began what this one ends."""
    part, end = _async_part(instruction)
    if end == "done":
        return f"async-collective-start{part}"
    return instruction.operands[0] if instruction.operands and instruction.opcode.endswith("-done") else ""


def walk(program: Program, mesh: Mesh, topology: Topology, filled: float = 1.0) -> Timeline:
    """The totals of a program on one device. `filled`: share of the rows of grouped matmuls that are there."""
    return _Walk(program, mesh, topology, filled).run(program.computations[program.entry])


def summarise_collectives(
    collectives: list[Collective], key: Callable[[Collective], Any] = lambda one: one.kind
) -> dict[Any, list[Collective]]:
    """Collectives by a key, in the order of their time."""
    groups: dict[Any, list[Collective]] = {}
    for one in collectives:
        groups.setdefault(key(one), []).append(one)
    return dict(sorted(groups.items(), key=lambda item: -sum(one.count * one.seconds for one in item[1])))
