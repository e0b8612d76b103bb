"""The text of compiled programs: what XLA writes is read back, from its CPU compiler's programs and from a TPU program's pieces."""

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from moejax.planning.program import Instruction, Program, item_bits, read_program, read_shapes

# Pieces of a program compiled for TPUs, shortened.
TPU_TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0:T(8,128)}}

FileNames
1 "step.py"

%wide.region_29.35_spmd.clone (wide.param.191: (s32[], bf16[1,4096,7168], /*index=2*/f32[35])) -> pred[] {
  %constant.734.clone.6 = s32[]{:T(128)} constant(35)
  %wide.param.191 = (s32[]{:T(128)}, bf16[1,4096,7168]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[35]{0:T(128)}) parameter(0)
  %get-tuple-element.3657 = s32[]{:T(128)} get-tuple-element(%wide.param.191), index=0
  ROOT %lt.712 = pred[]{:T(512)} compare(%get-tuple-element.3657, %constant.734.clone.6), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

%wide.region_2.34_spmd (wide.param.2: (s32[], bf16[1,4096,7168], /*index=2*/f32[35])) -> (s32[], bf16[1,4096,7168], f32[35]) {
  ROOT %wide.param.2 = (s32[]{:T(128)}, bf16[1,4096,7168]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[35]{0:T(128)}) parameter(0)
}

ENTRY %main.140_spmd (param.14: f32[8,128], param.15: bf16[56,4096,128]) -> f32[8,128] {
  %param.14 = f32[8,128]{1,0:T(8,128)} parameter(0), sharding={replicated}, metadata={op_name="state.params[\\'embed\\']"}
  %param.15 = bf16[56,4096,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %copy-start.72 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%param.14)
  %copy-done.72 = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.72)
  %splash_mha_fwd.4 = (f32[512,128]{1,0:T(8,128)}, bf16[56,4096,128]{2,1,0:T(8,128)(2,1)}) custom-call(%copy-done.72, /*index=1*/%param.15), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "block_q": 512,
  "note": "a bracket ( that nobody closes"
}}, metadata={op_name="jit(step)/jvp(Transformer)/attention"}, backend_config={"custom_call_config":{"body":"TUzvUgFNTElS"}}
  %tuple.1 = (s32[]{:T(128)}, bf16[1,4096,7168]{2,1,0:T(8,128)(2,1)}, f32[35]{0:T(128)}) tuple(%param.14, %param.15, %param.14)
  %while.87 = (s32[]{:T(128)}, bf16[1,4096,7168]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[35]{0:T(128)}) while(%tuple.1), condition=%wide.region_29.35_spmd.clone, body=%wide.region_2.34_spmd, metadata={op_name="jit(step)/while"}
  ROOT %fusion.9 = f32[8,128]{1,0:T(8,128)} fusion(%copy-done.72), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"108170"}}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def tpu() -> Program:
    return read_program(TPU_TEXT)


def test_computations_and_where_it_begins(tpu):
    assert list(tpu.computations) == ["wide.region_29.35_spmd.clone", "wide.region_2.34_spmd", "main.140_spmd"]
    assert tpu.entry == "main.140_spmd"
    main = tpu.computations[tpu.entry]
    assert [one.opcode for one in main.instructions] == [
        "parameter", "parameter", "copy-start", "copy-done", "custom-call", "tuple", "while", "fusion",
    ]  # fmt: skip
    assert main.parameters == {0: "param.14", 1: "param.15"}
    assert main.root.name == "fusion.9"


def test_a_kernel_s_description_over_several_lines_is_one_instruction(tpu):
    kernel = tpu.computations[tpu.entry].by_name["splash_mha_fwd.4"]
    assert kernel.operands == ("copy-done.72", "param.15")
    assert [shape.sizes for shape in kernel.shapes] == [(512, 128), (56, 4096, 128)]
    assert kernel.op_name == "jit(step)/jvp(Transformer)/attention"
    assert '"block_q": 512' in kernel.attributes


def test_tuples_with_layouts_tiles_and_memory_spaces(tpu):
    started = tpu.computations[tpu.entry].by_name["copy-start.72"]
    assert [(shape.type, shape.sizes, shape.on_core) for shape in started.shapes] == [
        ("f32", (8, 128), True),
        ("f32", (8, 128), False),
        ("u32", (), False),
    ]
    assert started.bytes == 2 * 8 * 128 * 4 + 4
    loop = tpu.computations[tpu.entry].by_name["while.87"]
    assert [shape.sizes for shape in loop.shapes] == [(), (1, 4096, 7168), (35,)]


def test_a_loop_without_a_known_count_runs_up_to_its_bound(tpu):
    loop = tpu.computations[tpu.entry].by_name["while.87"]
    assert tpu.trips(loop) == 35
    assert loop.called == ("wide.region_29.35_spmd.clone", "wide.region_2.34_spmd")
    assert [one.name for one in tpu.called_by(loop)] == list(loop.called)


def test_what_the_compiler_thinks_it_takes(tpu):
    main = tpu.computations[tpu.entry]
    assert main.root.cycles == 108170
    assert main.by_name["while.87"].cycles is None
    assert tpu.called_by(main.root) == []  # a computation that the text does not have


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[]", 4), ("pred[8]", 8), ("bf16[3,5]{1,0}", 30), ("s4[16]", 8), ("s4[3]", 2), ("u8[7]", 7), ("f8e4m3fn[16]", 16),
        ("f8e4m3b11fnuz[16]", 16), ("f4e2m1fn[16]", 8), ("c64[2]", 16), ("c128[2]", 32), ("f64[0,4]", 0), ("token[]", 0),
        ("f32[<=128,2]", 1024), ("(s32[], (bf16[2]{0:T(128)(2,1)S(1)}, u32[]{:S(2)}))", 12),
    ],
)  # fmt: skip
def test_bytes_of_shapes(text, expected):
    assert sum(shape.bytes for shape in read_shapes(text)) == expected


def test_bits_of_types():
    assert [item_bits(name) for name in ("bf16", "f8e5m2", "s4", "pred", "opaque")] == [16, 8, 4, 8, 0]


# Programs of the CPU compiler, compiled here.


def compiled_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def instructions(program: Program, opcode: str) -> list[Instruction]:
    return [one for computation in program.computations.values() for one in computation.instructions if one.opcode == opcode]


def nested(x):
    def outer(x, _):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        return lax.scan(inner, x, None, length=7)[0], None

    return lax.scan(outer, x, None, length=5)[0]


def test_trips_of_nested_scans():
    program = read_program(compiled_text(nested, jnp.ones((8, 8))))
    loops = {program.trips(loop): loop for loop in instructions(program, "while")}
    assert sorted(loops) == [5, 7]
    outside = program.called_by(loops[5])
    assert any(one is loops[7] for computation in outside for one in computation.instructions)
    assert any(one is loops[5] for one in program.computations[program.entry].instructions)


@pytest.mark.parametrize(("first", "last"), [(0, 6), (3, 10)])
def test_trips_of_counted_loops(first, last):
    program = read_program(compiled_text(lambda x: lax.fori_loop(first, last, lambda _, x: jnp.sin(x @ x), x), jnp.ones((8, 8))))
    assert [program.trips(loop) for loop in instructions(program, "while")] == [last - first]


def test_a_loop_whose_end_depends_on_data_counts_once():
    def run(x, end):
        return lax.while_loop(lambda at: at[0] < end, lambda at: (at[0] + 1, at[1] @ at[1]), (0, x))

    program = read_program(compiled_text(run, jnp.ones((8, 8)), 5))
    assert [program.trips(loop) for loop in instructions(program, "while")] == [1]


def test_both_branches_of_a_conditional_are_called():
    def choose(which, x):
        return lax.cond(which, lambda x: x @ x, lambda x: jnp.sin(x @ x) @ x, x)

    program = read_program(compiled_text(choose, True, jnp.ones((8, 8))))
    (conditional,) = instructions(program, "conditional")
    assert len(program.called_by(conditional)) == 2


def test_every_operand_of_a_compiled_program_is_known():
    text = compiled_text(jax.grad(lambda x: nested(x).sum()), jnp.ones((8, 8)))
    program = read_program(text)
    for computation in program.computations.values():
        for one in computation.instructions:
            assert all(name in computation.by_name for name in one.operands), one
            assert all(name in program.computations for name in one.called), one
    lines = sum(" = " in line and line.startswith(" ") for line in text.splitlines())
    assert sum(len(computation.instructions) for computation in program.computations.values()) == lines
