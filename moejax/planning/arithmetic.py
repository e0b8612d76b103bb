"""What an instruction of a compiled program computes and moves: FLOP and bytes of HBM, counted from shapes."""

import functools
import math
import re

from moejax.planning.program import ArrayShape, Computation, Instruction, Program

# These only name, reorder or wait: no work of their own.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all copy-done slice-done all-gather-done all-reduce-done "
    "collective-permute-done all-to-all-done ragged-all-to-all-done async-done partition-id replica-id opt-barrier domain".split()
)
# These copy between HBM and the cores' own memory beside everything else.
PREFETCHES = frozenset(("copy-start", "slice-start"))
_READS_PART = ("dynamic-slice", "slice", "gather")
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
    groups = instruction.number("batch_group_count") or 1
    return 2.0 * batch * features * kernel[kernel_labels.index("i")] * meeting / groups


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
    last = (inputs - 1) * lhs_dilate
    met = 0
    for out in range(result):
        for tap in range(kernel):
            place = out * stride + tap * rhs_dilate - low
            met += 0 <= place <= last and place % lhs_dilate == 0
    return met


def _meeting_places(inputs: int, kernel: int, result: int, window: dict[str, int]) -> int:
    """How often a place of the input meets one of the kernel, over all places of the result."""
    return _count_meeting(inputs, kernel, result, window["stride"], window["low"], window["lhs_dilate"], window["rhs_dilate"])


def kernel_flops(computation: Computation, instruction: Instruction, filled: float) -> float:
    """FLOP of the kernels we know: splash attention, counted causally, and the grouped matmul. 0 for all others."""
    arrays = [computation.by_name[name].shapes[0] for name in instruction.operands if computation.by_name[name].shapes]
    for prefix, matmuls in _ATTENTION_MATMULS.items():
        if instruction.name.startswith(prefix):
            heads = [array for array in arrays if len(array.sizes) > 2 and array.type in ("bf16", "f32")]
            if len(heads) < 2:
                return 0.0
            queries, keys = heads[0].sizes[-2], heads[1].sizes[-2]  # [..., heads, time, width]
            seen = (1 + 1 / max(queries, 1)) / 2 if queries == keys else 1.0
            return 2.0 * matmuls * heads[0].count * keys * seen
    if "ragged" in instruction.name or "ragged_dot" in instruction.op_name or "gmm" in instruction.name:
        matrices = [array for array in arrays if array.type in ("bf16", "f32") and len(array.sizes) in (2, 3)]
        if len(matrices) >= 2:
            return filled * _grouped_flops(matrices[0], matrices[1], instruction.shapes[0])
    return 0.0


def _grouped_flops(left: ArrayShape, right: ArrayShape, result: ArrayShape) -> float:
    """A grouped matmul [M, K] x [E, K, N] -> [M, N], or its weights' gradient [K, M] x [M, N] -> [E, K, N]."""
    if len(result.sizes) == 3:
        rows = max(set(left.sizes) & set(right.sizes), default=0)
        return 2.0 * rows * result.sizes[1] * result.sizes[2]
    contracted = [size for size in left.sizes if size != result.sizes[0]] or [left.sizes[-1]]
    return 2.0 * result.count * contracted[-1]


def count_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from HBM and writes there, each operand once, and of one that it reads in part, the part."""
    if instruction.opcode in PREFETCHES:
        return float(min((shape.bytes for shape in instruction.shapes if shape.count > 1), default=0))
    called = program.called_by(instruction) if instruction.opcode == "fusion" else []
    body = called[0] if called else None
    read = 0.0
    for number, name in enumerate(instruction.operands):
        operand = computation.by_name.get(name)
        if operand is None:
            continue
        whole = sum(shape.bytes for shape in operand.shapes if not shape.on_core)
        read += min(whole, _read_part(program, body, number)) if body is not None else _plain_read(instruction, number, whole)
    written = sum(shape.bytes for shape in instruction.shapes if not shape.on_core)
    return read + (_written_part(program, body, written) if body is not None else _plain_write(computation, instruction, written))


def _plain_read(instruction: Instruction, number: int, whole: float) -> float:
    if instruction.opcode in _READS_PART and number == 0:
        return float(instruction.bytes)
    return 0.0 if instruction.opcode == "dynamic-update-slice" and number == 0 else whole


def _plain_write(computation: Computation, instruction: Instruction, written: float) -> float:
    if instruction.opcode == "dynamic-update-slice":
        return float(computation.by_name[instruction.operands[1]].bytes)
    return float(written)


def _read_part(program: Program, body: Computation, number: int) -> float:
    """Bytes of a fusion's parameter that it reads: of one that is only sliced, the slices; of one that is updated in place, none."""
    name = body.parameters.get(number)
    if name is None:
        return 0.0
    total = 0.0
    for use in body.instructions:
        for place, operand in enumerate(use.operands):
            if operand != name:
                continue
            if use.opcode in _READS_PART and place == 0:
                total += use.bytes
            elif use.opcode == "fusion":
                total += _read_part(program, program.called_by(use)[0], place)
            elif use.opcode == "bitcast":
                return math.inf if _is_used_whole(body, use.name) else total + _sliced_bytes(body, use.name)
            elif not (use.opcode == "dynamic-update-slice" and place == 0):
                return math.inf
    return total


def _is_used_whole(body: Computation, name: str) -> bool:
    uses = [use for use in body.instructions if name in use.operands]
    return any(use.opcode not in (*_READS_PART, "dynamic-update-slice") for use in uses)


def _sliced_bytes(body: Computation, name: str) -> float:
    return float(sum(use.bytes for use in body.instructions if name in use.operands and use.opcode in _READS_PART))


def _written_part(program: Program, body: Computation, written: float) -> float:
    """Bytes that a fusion writes: of one that updates an array in place, the update."""
    root = body.root
    while root.opcode == "bitcast":
        root = body.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return float(body.by_name[root.operands[1]].bytes)
    if root.opcode == "fusion":
        return _written_part(program, program.called_by(root)[0], written)
    return float(written)
