"""The text of a compiled program as XLA writes it: computations, and in each its instructions in the order in which they are scheduled."""

import functools
import math
import re
from dataclasses import dataclass, field

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"(?P<type>[a-z]+[0-9]*(?:e[0-9]m[0-9a-z]+)?)\[(?P<sizes>[0-9,<=]*)\](?P<layout>\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_TOGETHER = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def item_bits(type: str) -> int:
    """Bits of an element: they stand in the type's name (bf16, f8e4m3fn, s4), but for truth values and what is no data."""
    digits = re.match(r"[a-z]+(\d+)", type)
    return int(digits[1]) if digits else {"pred": 8}.get(type, 0)


@dataclass(frozen=True)
class ArrayShape:
    """One array: element type, sizes, and whether it lies in the memory beside the cores instead of HBM."""

    type: str
    sizes: tuple[int, ...]
    on_core: bool

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes of the elements; a layout's padding is left out."""
        return math.ceil(self.count * item_bits(self.type) / 8)


@dataclass
class Instruction:
    """One instruction: `shapes` of what comes out, names of its operands, and the text of its attributes."""

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls."""
        branches = _CALLED_TOGETHER.search(self.attributes)
        names = _OPERAND.findall(branches[1]) if branches else []
        return tuple(names) + tuple(_CALLED.findall(self.attributes))

    @property
    def op_name(self) -> str:
        """The path of the jax operation it came from; empty where XLA made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """What the TPU compiler itself thinks that it takes, in cycles of the core."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def bytes(self) -> int:
        """Bytes of what comes out."""
        return sum(shape.bytes for shape in self.shapes)

    def number(self, attribute: str) -> int | None:
        """An attribute that is one number, as index=3."""
        found = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(found[1]) if found else None


@dataclass
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of its parameters by number."""
        return {int(one.attributes.split(")")[0] or 0): one.name for one in self.instructions if one.opcode == "parameter"}

    @property
    def root(self) -> Instruction:
        """What it gives back."""
        return next((one for one in self.instructions if one.is_root), self.instructions[-1])


@dataclass
class Program:
    """All computations of a module by name, and the one that runs first."""

    computations: dict[str, Computation]
    entry: str

    def called_by(self, instruction: Instruction) -> list[Computation]:
        """The computations that an instruction calls."""
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def trips(self, loop: Instruction) -> int:
        """How often a while loop's body runs: what its counter, which starts at 0, is compared with. 1 where that is not a constant,
        as in a loop that ends when all rows have."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        found = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        condition = self.computations.get(found[1]) if found else None
        if condition is None:
            return 1
        bounds = self._constants(condition)
        return bounds[0] if len(bounds) == 1 and bounds[0] > 0 else 1

    def _constants(self, condition: Computation) -> list[int]:
        """Integer constants of a loop's condition, those of a fused comparison included."""
        found = [
            int(one.attributes.split(")")[0])
            for one in condition.instructions
            if one.opcode == "constant" and re.match(r"-?\d+\)", one.attributes)
        ]
        for one in condition.instructions:
            for called in self.called_by(one):
                found += self._constants(called)
        return found


def read_program(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations[header["name"]] = Computation(header["name"])
            entry = header["name"] if header["entry"] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.instructions.append(_read_instruction(found["name"], found["rest"], bool(found["root"])))
        elif current is not None and current.instructions and line != "}":
            current.instructions[-1].attributes += line  # a kernel's own description runs over several lines, and may end with }}
    return Program(computations, entry)


def read_shapes(text: str) -> tuple[ArrayShape, ...]:
    """The arrays of a shape's text, of a tuple one after another."""
    return tuple(
        ArrayShape(
            found["type"], tuple(int(size.lstrip("<=")) for size in found["sizes"].split(",") if size), "S(1)" in (found["layout"] or "")
        )
        for found in _ARRAY.finditer(text)
    )


def _read_instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    last = _closing("(" + rest, 0) - 1
    inside, outside = rest[:last], rest[last + 1 :]
    holds_value = opcode in ("parameter", "constant")
    return Instruction(
        name, opcode, read_shapes(shape), () if holds_value else tuple(_OPERAND.findall(inside)), rest if holds_value else outside, is_root
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1
