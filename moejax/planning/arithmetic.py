"""What an instruction of a compiled program computes and moves: FLOP and bytes of HBM, counted from shapes."""

import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from moejax.planning.program import ArrayShape, Computation, Instruction, Program

# These only name, reorder or wait: no work of their own.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all copy-done slice-done all-gather-done all-reduce-done "
    "collective-permute-done all-to-all-done ragged-all-to-all-done async-update async-done "
    "partition-id replica-id opt-barrier domain add-dependency custom-call-start".split()
)
# These copy between HBM and the cores' own memory beside everything else.
PREFETCHES = frozenset(("copy-start", "slice-start"))
_READS_PART = ("dynamic-slice", "slice", "gather")
# These write into their first operand; the number is that of what they write there.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
# A fusion may carry a piece of one of these beside its own work; links are reckoned elsewhere.
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Custom calls that reserve memory or promise something, and do nothing.
_WORKLESS = re.compile(r'custom_call_target="(?:AllocateBuffer|AssumeGatherIndicesInBound|Sharding|ConcatBitcast)"')
# Matmuls of a splash attention kernel: scores and values forward; scores again and two or three products backward.
_ATTENTION_MATMULS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def count_flops(program: Program, computation: Computation, instruction: Instruction, filled: float = 1.0) -> float:
    """FLOP of matmuls in an instruction and what it calls, loops apart. `filled`: share of the rows of grouped matmuls that are there."""
    if instruction.opcode == "convolution":
        return convolution_flops(computation, instruction)
    if instruction.opcode == "dot":
        return dot_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        return kernel_flops(computation, instruction, filled)
    if instruction.opcode in ("fusion", "call", "async-start"):
        return sum(computation_flops(program, called, filled) for called in program.called_by(instruction))
    return 0.0


def computation_flops(program: Program, computation: Computation, filled: float) -> float:
    """FLOP of a called computation's matmuls."""
    return sum(count_flops(program, computation, one, filled) for one in computation.instructions)


def dot_flops(computation: Computation, instruction: Instruction) -> float:
    """2 x elements of the result x contracted size."""
    left = computation.by_name[instruction.operands[0]].shapes[0].sizes
    found = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.attributes)
    contracted = [int(place) for place in found[1].split(",") if place] if found else []
    return 2.0 * instruction.shapes[0].count * math.prod(left[place] for place in contracted)


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOP of a convolution, which is what TPUs make of a matmul: batches are spatial dimensions, of which only places that meet count."""
    found = re.search(r"dim_labels=(\S+?)(?:,|$)", instruction.attributes)
    assert found is not None
    sides, _, out_labels = found[1].partition("->")
    in_labels, _, kernel_labels = sides.partition("_")
    inputs, kernel = (computation.by_name[name].shapes[0].sizes for name in instruction.operands[:2])
    result = instruction.shapes[0].sizes
    spatial = sorted(label for label in kernel_labels if label.isdigit())
    window = _read_window(instruction.attributes, len(spatial))
    meeting = 1
    for place, label in enumerate(spatial):
        meeting *= _meeting_places(
            inputs[in_labels.index(label)], kernel[kernel_labels.index(label)], result[out_labels.index(label)], window[place]
        )
    batch, features = result[out_labels.index("b")], result[out_labels.index("f")]
    return 2.0 * batch * features * kernel[kernel_labels.index("i")] * meeting


def _read_window(attributes: str, dimensions: int) -> list[dict[str, int]]:
    """Stride, padding and dilations of each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(part.split("=", 1) for part in found[1].split() if "=" in part) if found else {}
    windows = []
    for place in range(dimensions):
        window = {"stride": 1, "low": 0, "lhs_dilate": 1, "rhs_dilate": 1}
        for name in ("stride", "lhs_dilate", "rhs_dilate"):
            if name in parts:
                window[name] = int(parts[name].split("x")[place])
        if "pad" in parts:
            window["low"] = int(parts["pad"].split("x")[place].split("_")[0])
        windows.append(window)
    return windows


@functools.lru_cache(maxsize=4096)
def _count_meeting(inputs: int, kernel: int, result: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    places = np.arange(result)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilate - low
    return int(((places >= 0) & (places <= (inputs - 1) * lhs_dilate) & (places % lhs_dilate == 0)).sum())


def _meeting_places(inputs: int, kernel: int, result: int, window: dict[str, int]) -> int:
    """How often a place of the input meets one of the kernel, over all places of the result."""
    return _count_meeting(inputs, kernel, result, window["stride"], window["low"], window["lhs_dilate"], window["rhs_dilate"])


def kernel_flops(computation: Computation, instruction: Instruction, filled: float) -> float:
    """FLOP of the kernels we know: splash attention, counted causally, and the grouped matmul. 0 for all others."""
    arrays = [computation.by_name[name].shapes[0] for name in instruction.operands if computation.by_name[name].shapes]
    floats = [array for array in arrays if array.type in ("bf16", "f16", "f32")]
    for prefix, matmuls in _ATTENTION_MATMULS.items():
        if instruction.name.startswith(prefix):
            query, key = [array for array in floats if len(array.sizes) >= 3][:2]  # heads, length, width; rows before them if several
            seen = (1 + 1 / query.sizes[-2]) / 2 if query.sizes[-2] == key.sizes[-2] else 1.0
            return 2.0 * matmuls * query.count * key.sizes[-2] * seen
    if "ragged" in instruction.name or "ragged_dot" in instruction.op_name or "gmm" in instruction.name:
        matrices = [array for array in floats if len(array.sizes) in (2, 3)]
        if len(matrices) >= 2:
            return filled * _grouped_flops(matrices[0], matrices[1], instruction.shapes[0])
    return 0.0


def _grouped_flops(left: ArrayShape, right: ArrayShape, result: ArrayShape) -> float:
    """A grouped matmul [M, K] x [E, K, N] -> [M, N], or its weights' gradient [K, M] x [M, N] -> [E, K, N]."""
    if len(result.sizes) == 3:
        matrix = result.sizes[1] * result.sizes[2]  # K N; both operands together have M K M N elements, however they lie
        return 2.0 * math.isqrt(left.count * right.count // matrix) * matrix
    contracted = [size for size in left.sizes if size != result.sizes[0]] or [left.sizes[-1]]
    return 2.0 * result.count * contracted[-1]


def count_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from HBM and writes there, each operand once, and of one that it reads in part, the part."""
    if instruction.opcode in PREFETCHES:
        return float(min((shape.bytes for shape in instruction.shapes if shape.count > 1), default=0))
    if instruction.opcode == "custom-call" and _WORKLESS.search(instruction.attributes):
        return 0.0
    called = program.called_by(instruction) if instruction.opcode == "fusion" else []
    body = called[0] if called else None
    read = 0.0
    for number, name in enumerate(instruction.operands):
        operand = computation.by_name.get(name)
        if operand is None:
            continue
        whole = sum(shape.bytes for shape in operand.shapes if not shape.on_core)
        if body is None:
            read += _plain_read(instruction, number, whole)
        elif number in body.parameters:
            read += min(whole, _read_part(program, body, body.parameters[number]))
    if body is not None:
        return read + _written_part(program, body, instruction.shapes)
    return read + _plain_write(computation, instruction, sum(shape.bytes for shape in instruction.shapes if not shape.on_core))


def _plain_read(instruction: Instruction, number: int, whole: float) -> float:
    if instruction.opcode in _READS_PART and number == 0:
        return float(instruction.bytes)
    return 0.0 if instruction.opcode in _IN_PLACE and number == 0 else whole


def _plain_write(computation: Computation, instruction: Instruction, written: float) -> float:
    return float(_update_bytes(computation, instruction)) if instruction.opcode in _IN_PLACE else float(written)


def _update_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction writes into the array that is its first operand."""
    return computation.by_name[instruction.operands[_IN_PLACE[instruction.opcode]]].bytes


def _read_part(program: Program, body: Computation, name: str) -> float:
    """Bytes of a fusion's parameter that it reads: of one that is only sliced, the slices; of one that is updated in place, none."""
    total = 0.0
    for use in body.instructions:
        for place, operand in enumerate(use.operands):
            if operand != name:
                continue
            if use.opcode in _READS_PART and place == 0:
                total += use.bytes
            elif use.opcode == "fusion":
                called = program.called_by(use)[0]
                total += _read_part(program, called, called.parameters[place])
            elif use.opcode == "bitcast":
                total += _read_part(program, body, use.name)
            elif use.opcode not in ("tuple", *_COLLECTIVES) and not (use.opcode in _IN_PLACE and place == 0):
                return math.inf
    return total


def _written_part(program: Program, body: Computation, shapes: Sequence[ArrayShape]) -> float:
    """Bytes that a fusion with these results writes to HBM: of one that it updates in place, the update; of one handed on, none."""
    results = [body.by_name[name] for name in body.root.operands] if body.root.opcode == "tuple" else [body.root]
    if len(results) != len(shapes):  # a tuple in a tuple
        return float(sum(shape.bytes for shape in shapes if not shape.on_core))
    written = 0.0
    for result, shape in zip(results, shapes, strict=True):
        while result.opcode == "bitcast":
            result = body.by_name[result.operands[0]]
        if shape.on_core or result.opcode in ("parameter", *_COLLECTIVES):
            continue
        if result.opcode in _IN_PLACE:
            written += _update_bytes(body, result)
        elif result.opcode == "fusion":
            written += _written_part(program, program.called_by(result)[0], (shape,))
        else:
            written += shape.bytes
    return written
