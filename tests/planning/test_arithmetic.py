"""FLOP and bytes of instructions against counts by hand: matmuls as CPUs and as TPUs write them, kernels, fusions that read a part."""

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from moejax.config import ModelConfig, TrainConfig
from moejax.families.flops import count_flops as count_by_hand
from moejax.model.transformer import Transformer
from moejax.planning.arithmetic import count_bytes, count_flops
from moejax.planning.program import read_program
from moejax.planning.timeline import walk
from moejax.planning.topology import open_topology
from moejax.sharding import make_mesh
from moejax.training.plan import abstract_batch
from moejax.training.state import abstract_state, create_optimizer
from moejax.training.step import train_step


def entry_of(*lines: str, before: str = ""):
    """A program of one computation with these lines; the computations that it calls stand before it."""
    text = "\n".join(["HloModule m", before, "ENTRY %main () -> f32[] {", *(f"  {line}" for line in lines), "}"])
    program = read_program(text)
    return program, program.computations[program.entry]


def flops_of(*lines: str, filled: float = 1.0) -> float:
    program, main = entry_of(*lines)
    return sum(count_flops(program, main, one, filled) for one in main.instructions)


# Matmuls.


@pytest.mark.parametrize(
    ("left", "right", "out", "contracted", "expected"),
    [
        ("f32[4,5]", "f32[5,6]", "f32[4,6]", "{1}", 2 * 4 * 5 * 6),
        ("bf16[8,4,5]", "bf16[8,5,6]", "f32[8,4,6]", "{2}, lhs_batch_dims={0}, rhs_batch_dims={0}", 2 * 8 * 4 * 5 * 6),
        ("f32[4,5,7]", "f32[5,7,3]", "f32[4,3]", "{1,2}", 2 * 4 * 35 * 3),
        ("f32[4]", "f32[3]", "f32[4,3]", "{}", 2 * 4 * 3),
    ],
)
def test_dots(left, right, out, contracted, expected):
    flops = flops_of(
        f"%a = {left}{{0}} parameter(0)",
        f"%b = {right}{{0}} parameter(1)",
        f"ROOT %c = {out}{{0}} dot(%a, %b), lhs_contracting_dims={contracted}",
    )
    assert flops == expected


T, D, F, HEADS, WIDTH = 4096, 7168, 4864, 56, 128


@pytest.mark.parametrize(
    ("left", "right", "out", "how", "expected"),
    [
        # As in a step compiled for v5p: plain, with the sides turned, and heads as a place that slides over the kernel.
        ([T, D], [D, D], [T, D], "dim_labels=bf_oi->bf", 2 * T * D * D),
        ([T, D], [T, F], [D, F], "dim_labels=fb_io->bf", 2 * T * D * F),
        ([1, T, D], [D, D, 1], [1, T, D], "window={size=1}, dim_labels=b0f_io0->b0f", 2 * T * D * D),
        (
            [T, D, 1], [HEADS, WIDTH, D], [T, HEADS, WIDTH],
            f"window={{size={HEADS} pad={HEADS - 1}_{HEADS - 1} rhs_reversal=1}}, dim_labels=bf0_0oi->b0f", 2 * T * D * HEADS * WIDTH,
        ),
        # Batched: of a batch of 8 each place of the input meets one of the kernel, by dilation.
        (
            [8, 32, 64], [8, 16, 64], [8, 32, 16],
            "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0oi->0bf", 2 * 8 * 32 * 64 * 16,
        ),
        (
            [4, 6, 32, 64], [4, 6, 16, 64], [4, 6, 32, 16],
            "window={size=4x6 stride=3x5 pad=0_0x0_0 lhs_dilate=4x6}, dim_labels=01bf_01oi->01bf", 2 * 24 * 32 * 64 * 16,
        ),
        # Batched by groups: 8 groups of 4 rows, each with its own features.
        ([32, 64], [64, 40], [4, 40], "dim_labels=bf_io->bf, batch_group_count=8", 2 * 4 * 64 * 40),
        ([4, 64], [8, 40], [4, 40], "dim_labels=bf_io->bf, feature_group_count=8", 2 * 4 * 8 * 40),
    ],
)  # fmt: skip
def test_convolutions_that_are_matmuls(left, right, out, how, expected):
    names = [f"bf16[{','.join(map(str, sizes))}]{{0}}" for sizes in (left, right, out)]
    flops = flops_of(f"%a = {names[0]} parameter(0)", f"%b = {names[1]} parameter(1)", f"ROOT %c = {names[2]} convolution(%a, %b), {how}")
    assert flops == expected


@pytest.mark.parametrize(
    ("inputs", "kernel", "window", "padding"), [((2, 12, 3), (5, 3, 4), 1, "SAME"), ((2, 11, 3), (3, 3, 4), 2, "VALID")]
)
def test_a_true_convolution_counts_what_meets(inputs, kernel, window, padding):
    """XLA's own count leaves out what meets only padding, as does this one."""

    def convolve(x, weights):
        return lax.conv_general_dilated(x, weights, (window,), padding, dimension_numbers=("NHC", "HIO", "NHC"))

    compiled = jax.jit(convolve).lower(jnp.ones(inputs), jnp.ones(kernel)).compile()
    program = read_program(compiled.as_text())
    main = program.computations[program.entry]
    flops = sum(count_flops(program, main, one) for one in main.instructions)
    assert flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)
    assert flops > 0


# A training step.


@pytest.mark.slow
def test_a_training_step_is_what_the_configuration_says():
    """All matmuls of the compiled step are those counted by hand, but that all scores are computed and a query sees half of them.

    The sizes make the hand count exact: experts have slots for just as many rows as are sent, so none is empty; so few queries are not
    divided into blocks; nothing is computed twice. The loops over layers run as often as there are layers.
    """
    rows, length = 4, 16
    config = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, num_experts=4,
        experts_per_token=2, dispatch="capacity", remat="none", max_length=512,
    )  # fmt: skip
    mesh = make_mesh(devices=jax.devices()[:1])
    model, optimizer = Transformer(config, mesh), create_optimizer(TrainConfig(optimizer="adamw"))
    lowered = train_step.lower(model, optimizer, abstract_state(model, optimizer), abstract_batch(mesh, (rows, length)))
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    program = read_program(lowered.compile(compiler_options=quickly).as_text())
    unseen = length**2 - length * (length + 1) // 2
    scores = rows * config.num_layers * 3 * 4 * config.num_heads * config.head_width * unseen
    by_hand = count_by_hand(config, rows, length)
    timeline = walk(program, mesh, open_topology("local"))
    assert timeline.flops == by_hand + scores
    assert timeline.flops == pytest.approx(by_hand, rel=0.02)
    assert timeline.hbm_bytes > 3 * 4 * 2 * 1e5  # weights and two moments, each read and written
    assert timeline.seconds == 0  # of CPUs nothing is known


# Kernels.


def attention(name: str, query: str, key: str) -> tuple[str, ...]:
    """A splash attention kernel's call: masks first, then query, key and value."""
    return (
        "%m = s8[1,8,8]{2,1,0} parameter(0)",
        f"%q = bf16[{query}]{{2,1,0}} parameter(1)",
        f"%k = bf16[{key}]{{2,1,0}} parameter(2)",
        f"ROOT %{name}.4 = (f32[512,128]{{1,0}}, bf16[{query}]{{2,1,0}}) custom-call(%m, %m, %q, %k, %k), "
        'custom_call_target="tpu_custom_call"',
    )


@pytest.mark.parametrize(("name", "matmuls"), [("splash_mha_fwd_segmented_residuals", 2), ("splash_mha_dkv_x", 4), ("splash_mha_dq", 3)])
def test_attention_kernels_count_the_half_that_is_seen(name, matmuls):
    seen = 4096 * 4097 // 2
    assert flops_of(*attention(name, "56,4096,128", "8,4096,128")) == matmuls * 2 * 56 * 128 * seen
    assert flops_of(*attention(name, "3,56,4096,128", "3,8,4096,128")) == 3 * matmuls * 2 * 56 * 128 * seen  # several rows
    assert flops_of(*attention(name, "56,512,128", "8,4096,128")) == matmuls * 2 * 56 * 128 * 512 * 4096  # a piece of the queries


@pytest.mark.parametrize(
    ("left", "right", "out", "expected"),
    [
        ([16416, D], [1, D, F], [16416, F], 2 * 16416 * D * F),
        ([16416, F], [4, D, F], [16416, D], 2 * 16416 * D * F),  # weights turned
        ([D, D], [2, D, F], [D, F], 2 * D * D * F),  # as many rows as columns
        ([D, 512], [512, F], [4, D, F], 2 * 512 * D * F),  # a weight gradient
        ([512, D], [512, D], [4, D, D], 2 * 512 * D * D),  # of a square matrix, with fewer rows than it has
    ],
)
def test_grouped_matmuls(left, right, out, expected):
    sizes = [",".join(map(str, one)) for one in (left, right, out)]
    lines = (
        "%n = s32[8]{0} parameter(0)",
        f"%a = bf16[{sizes[0]}]{{1,0}} parameter(1)",
        f"%b = bf16[{sizes[1]}]{{1,0}} parameter(2)",
        f'ROOT %ragged-dot-none.7 = bf16[{sizes[2]}]{{1,0}} custom-call(%n, %a, %b), custom_call_target="tpu_custom_call"',
    )
    assert flops_of(*lines) == expected
    assert flops_of(*lines, filled=0.5) == expected / 2


# Bytes.


def bytes_of(*lines: str, before: str = "") -> float:
    """Bytes of the last line."""
    program, main = entry_of(*lines, before=before)
    return count_bytes(program, main, main.instructions[-1])


LAYERS = "%w = f32[35,1024,896]{2,1,0} parameter(0)"
INDEX = "%i = s32[] parameter(1)"
ONE_LAYER = 1024 * 896 * 4


def fused(*lines: str, result: str) -> str:
    return "\n".join([f"%fused (x: f32[]) -> {result} {{", *(f"  {line}" for line in lines), "}"])


def test_bytes_of_a_plain_instruction():
    assert bytes_of("%a = f32[8,4]{1,0} parameter(0)", "ROOT %b = bf16[8,4]{1,0} convert(%a)") == 8 * 4 * (4 + 2)


def test_what_lies_beside_the_cores_is_not_hbm_s():
    lines = ("%a = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)", "%b = f32[8,4]{1,0} parameter(1)")
    assert bytes_of(*lines, "ROOT %c = f32[8,4]{1,0:T(8,128)S(1)} add(%a, %b)") == 128
    copy = "(f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%b)"
    assert bytes_of(*lines, f"ROOT %c = {copy}") == 128


def test_a_slice_of_the_layers_counts_the_slice():
    assert bytes_of(LAYERS, INDEX, "ROOT %s = f32[1,1024,896]{2,1,0} dynamic-slice(%w, %i, %i, %i)") == pytest.approx(2 * ONE_LAYER, abs=12)
    before = fused(
        LAYERS, INDEX, "%s = f32[1,1024,896]{2,1,0} dynamic-slice(%w, %i, %i, %i)", "%b = f32[1024,896]{1,0} bitcast(%s)",
        "ROOT %c = bf16[1024,896]{1,0} convert(%b)", result="bf16[1024,896]",
    )  # fmt: skip
    call = "ROOT %f = bf16[1024,896]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused"
    assert bytes_of(LAYERS, INDEX, call, before=before) == pytest.approx(1.5 * ONE_LAYER, abs=4)


def test_a_slice_of_the_same_bytes_in_another_shape_counts_the_slice():
    before = fused(
        LAYERS, INDEX, "%b = f32[35,917504]{1,0} bitcast(%w)", "%s = f32[1,917504]{1,0} dynamic-slice(%b, %i, %i)",
        "ROOT %n = f32[1,917504]{1,0} negate(%s)", result="f32[1,917504]",
    )  # fmt: skip
    call = "ROOT %f = f32[1,917504]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused"
    assert bytes_of(LAYERS, INDEX, call, before=before) == pytest.approx(2 * ONE_LAYER, abs=4)


@pytest.mark.parametrize("use", ["negate(%b)", "add(%b, %b)", "bitcast(%b)"])
def test_another_use_counts_whatever_the_first_was(use):
    """A parameter sliced through a bitcast and used whole elsewhere is read whole; so is one used whole through two bitcasts."""
    end = "ROOT %t = (f32[1,917504]{1,0}, f32[35,917504]{1,0}) tuple(%s, %n)"
    if use.startswith("bitcast"):
        end = "%z = f32[35,917504]{1,0} negate(%n)\n  ROOT %t = (f32[1,917504]{1,0}, f32[35,917504]{1,0}) tuple(%s, %z)"
    before = fused(
        LAYERS, INDEX, "%b = f32[35,917504]{1,0} bitcast(%w)", "%s = f32[1,917504]{1,0} dynamic-slice(%b, %i, %i)",
        f"%n = f32[35,917504]{{1,0}} {use}", end, result="(f32[1,917504], f32[35,917504])",
    )  # fmt: skip
    call = "ROOT %f = (f32[1,917504]{1,0}, f32[35,917504]{1,0}) fusion(%w, %i), kind=kLoop, calls=%fused"
    assert bytes_of(LAYERS, INDEX, call, before=before) == pytest.approx((35 + 1 + 35) * ONE_LAYER, abs=4)


def test_an_update_in_place_counts_the_update():
    update = "%u = bf16[1,1024,896]{2,1,0} parameter(2)"
    before = fused(
        LAYERS, INDEX, update, "%c = f32[1,1024,896]{2,1,0} convert(%u)",
        "ROOT %d = f32[35,1024,896]{2,1,0} dynamic-update-slice(%w, %c, %i, %i, %i)", result="f32[35,1024,896]",
    )  # fmt: skip
    call = "ROOT %f = f32[35,1024,896]{2,1,0} fusion(%w, %i, %u), kind=kLoop, calls=%fused"
    assert bytes_of(LAYERS, INDEX, update, call, before=before) == pytest.approx(1.5 * ONE_LAYER, abs=4)
    plain = "ROOT %d = f32[35,1024,896]{2,1,0} dynamic-update-slice(%w, %c, %i, %i, %i)"
    assert bytes_of(LAYERS, INDEX, "%c = f32[1,1024,896]{2,1,0} parameter(2)", plain) == pytest.approx(2 * ONE_LAYER, abs=12)


def test_several_updates_in_one_fusion_count_the_updates():
    update = "%u = f32[1,1024,896]{2,1,0} parameter(2)"
    before = fused(
        LAYERS, INDEX, update, "%d = f32[35,1024,896]{2,1,0} dynamic-update-slice(%w, %u, %i, %i, %i)",
        "%n = f32[1,1024,896]{2,1,0} negate(%u)",
        "ROOT %t = (f32[35,1024,896]{2,1,0}, f32[1,1024,896]{2,1,0}) tuple(%d, %n)", result="(f32[35,1024,896], f32[1,1024,896])",
    )  # fmt: skip
    call = "ROOT %f = (f32[35,1024,896]{2,1,0}, f32[1,1024,896]{2,1,0}) fusion(%w, %i, %u), kind=kLoop, calls=%fused"
    assert bytes_of(LAYERS, INDEX, update, call, before=before) == pytest.approx(3 * ONE_LAYER, abs=4)


def test_a_matmul_that_carries_a_piece_of_a_gather_counts_as_without_it():
    lines = (
        "%shard = bf16[64,512]{1,0} parameter(0)", "%room = bf16[512,512]{1,0} parameter(1)", "%x = bf16[128,256]{1,0} parameter(2)",
        "%y = bf16[256,64]{1,0} parameter(3)",
    )  # fmt: skip
    results = "(bf16[128,64]{1,0}, bf16[64,512]{1,0}, bf16[512,512]{1,0}, bf16[512,512]{1,0})"
    before = fused(
        *lines, "%g = bf16[512,512]{1,0} all-gather(%shard), replica_groups=[1,8]<=[8], dimensions={0}",
        "%c = bf16[128,64]{1,0} convolution(%x, %y), dim_labels=bf_io->bf", f"ROOT %t = {results} tuple(%c, %shard, %room, %g)",
        result="(bf16[128,64])",
    )  # fmt: skip
    call = f"ROOT %f = {results} fusion(%shard, %room, %x, %y), kind=kOutput, calls=%fused"
    assert bytes_of(*lines, call, before=before) == 2 * (128 * 256 + 256 * 64 + 128 * 64)


def test_reserved_memory_is_not_written():
    assert bytes_of('ROOT %b = f32[35,1024,896]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"') == 0


def test_a_loop_that_slices_its_weights_reads_them_once_in_all():
    """Layers of a scan: 6 runs that each read a sixth, and a state that is read and written."""

    def layers(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x, weights = jnp.ones((4, 64)), jnp.ones((6, 64, 64))
    program = read_program(jax.jit(layers).lower(x, weights).compile().as_text())
    timeline = walk(program, make_mesh(devices=jax.devices()[:1]), open_topology("local"))
    assert timeline.flops == 6 * 2 * 4 * 64 * 64
    assert weights.nbytes < timeline.hbm_bytes < 4 * weights.nbytes
