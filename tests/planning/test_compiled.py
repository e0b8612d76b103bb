"""Programs compiled and read: memory from the compiler's plan, what does not fit, rows for JSON."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.planning import compiled as module
from moejax.planning.compiled import ASSUMPTIONS, Compiled, compile_program, describe_chip, describe_collectives, memory_of
from moejax.planning.program import read_program
from moejax.planning.timeline import walk
from moejax.planning.topology import open_topology
from moejax.sharding import make_mesh
from tests.planning.slices import make_mesh as make_slice_mesh
from tests.planning.slices import make_topology

SIZE = 64 * 64 * 4


@pytest.fixture(scope="module")
def found() -> Compiled:
    """A matmul whose weights lie apart on eight simulated devices, and whose first argument is donated."""
    mesh = make_mesh(fsdp=8)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=whole)
    weights = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    step = jax.jit(lambda x, weights: (x @ weights, weights.sum()), donate_argnums=0, out_shardings=(whole, whole))
    return compile_program(step.lower(x, weights), mesh, open_topology("local"), {})


def test_memory_is_what_the_compiler_says_of_one_device(found):
    assert found.argument_bytes == SIZE + SIZE // 8
    assert 0 <= found.output_bytes < 1024  # the product lies where x lay; a scalar is left
    assert found.needed_bytes == found.argument_bytes + found.output_bytes + found.temporary_bytes + found.program_bytes
    assert found.fits and found.compile_seconds > 0


def test_the_program_is_read_and_walked(found):
    assert found.timeline.flops == 2 * 64**3
    kinds = {one.kind for one in found.timeline.collectives}
    assert kinds and kinds <= {"all-gather", "all-reduce"}
    assert all(one.group.axes == ("fsdp",) for one in found.timeline.collectives)
    assert found.compiler_flops == pytest.approx(found.timeline.flops, rel=0.1)


def lowered_that(message: str) -> SimpleNamespace:
    def refuse(compiler_options):
        raise jax.errors.JaxRuntimeError(message)

    return SimpleNamespace(compile=refuse)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        # libtpu 0.0.42, word for word; arguments and results are in the figure.
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.84G) exceeds available HBM "
            "(15.75G).",
            26.84 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 167.66G of 95.74G hbm. Exceeded "
         "hbm capacity by 71.91G.", 167.66 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 900.5M of 15.75G hbm.", 900.5 * 2**20),
    ],
)  # fmt: skip
def test_what_does_not_fit_comes_back_with_what_it_needs(message, needed):
    refused = compile_program(lowered_that(message), make_mesh(fsdp=8), open_topology("local"), {})
    assert not refused.fits
    assert refused.needed_bytes == int(needed)
    assert refused.program is None and refused.timeline.collectives == []


@pytest.mark.parametrize(
    "message",
    [
        "INVALID_ARGUMENT: no such option",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.20M of 16.00M vmem.",  # a kernel's fault, not the run's size
        "RESOURCE_EXHAUSTED: something else",
    ],
)
def test_another_failure_is_the_caller_s(message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message.split(":")[0]):
        compile_program(lowered_that(message), make_mesh(fsdp=8), open_topology("local"), {})


def test_what_needs_more_than_the_chip_has_does_not_fit(found, monkeypatch):
    monkeypatch.setattr(module, "memory_of", lambda topology: found.argument_bytes)
    mesh = make_mesh(fsdp=8)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    again = compile_program(jax.jit(lambda x: x @ x).lower(x), mesh, open_topology("local"), {})
    assert not again.fits and again.needed_bytes > found.argument_bytes


def test_options_reach_the_compiler():
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_program(lowered, make_mesh(fsdp=8), open_topology("local"), {"xla_no_such_option": True})


def test_memory_of_a_device():
    assert memory_of(make_topology("v5e:4x4")) == 16 * 2**30
    local = open_topology("local")
    assert 2**26 < memory_of(local) < 2**45
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 60 * 10**9})
    assert memory_of(replace(local, devices=(gpu,))) == 60 * 10**9
    assert memory_of(replace(local, devices=(SimpleNamespace(platform="gpu", memory_stats=lambda: None),))) is None


def test_rows_put_together_what_is_alike():
    topology = make_topology("v5p:4x4x4")
    group, other = "replica_groups=[4,16]<=[64]", "replica_groups=[16,4]<=[4,16]T(1,0)"
    exchange = lambda name, at: f'  %{name} = bf16[1024]{{0}} all-to-all(%a), {group}, metadata={{op_name="{at}"}}'  # noqa: E731
    text = "\n".join(
        [
            "HloModule m", "ENTRY %main () -> f32[] {", "  %a = bf16[1024]{0} parameter(0)", exchange("b", "jit(f)/jvp(M)/x"),
            exchange("c", "jit(f)/jvp(M)/y"), exchange("d", "jit(f)/transpose(jvp(M))/x"),
            f"  %e = bf16[4096]{{0}} all-gather(%a), {other}", "}",
        ]
    )  # fmt: skip
    timeline = walk(read_program(text), make_slice_mesh(topology, fsdp=4, expert=16), topology)
    rows = describe_collectives(timeline)
    assert json.loads(json.dumps(rows)) == rows
    kinds = {(row["kind"], row["direction"]): row for row in rows}
    assert set(kinds) == {("all-to-all", "forward"), ("all-to-all", "backward"), ("all-gather", "other")}
    forward = kinds["all-to-all", "forward"]
    assert (forward["runs"], forward["bytes"], forward["asynchronous"], forward["axes"]) == (2, 2 * 2048, False, ["expert"])
    assert forward["group"] == {"devices": 16, "axes": ["expert"], "torus": [[4, "ring"], [4, "ring"]]}
    assert kinds["all-gather", "other"]["axes"] == ["fsdp"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(timeline.link_seconds)
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)


def test_the_chip_s_row_is_for_json():
    chip = json.loads(json.dumps(describe_chip(make_topology("v5p:4x4x4"))))
    assert (chip["name"], chip["flops_per_second"]) == ("v5p", 459e12)
    assert describe_chip(open_topology("local")) is None


def test_assumptions_are_sentences_of_one_line():
    assert all(sentence and "\n" not in sentence for sentence in ASSUMPTIONS)


@pytest.mark.slow
def test_libtpu_s_refusal_is_understood():
    """Compiled for a chip that is not there: 2 x 120,000^2 bytes are more than v5e has."""
    pytest.importorskip("libtpu")
    topology = open_topology("v5e:2x2")
    mesh = make_mesh(fsdp=4, devices=list(topology.devices))
    x = jax.ShapeDtypeStruct((120_000, 120_000), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    refused = compile_program(jax.jit(lambda x: x + 1).lower(x), mesh, topology, {})
    assert not refused.fits
    assert refused.needed_bytes == pytest.approx(2 * 2 * 120_000**2, rel=0.01)


@pytest.mark.slow
def test_a_matmul_compiled_for_a_tpu_takes_at_least_its_flops_and_bytes():
    """The TPU compiler's own program of 8192^3 on v5p, and of one row times a matrix."""
    pytest.importorskip("libtpu")
    topology = open_topology("v5p:2x2x1")
    mesh = make_mesh(fsdp=4, devices=list(topology.devices))
    place = NamedSharding(mesh, PartitionSpec())
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)  # noqa: E731
    square = compile_program(jax.jit(jnp.matmul).lower(shape(8192, 8192), shape(8192, 8192)), mesh, topology, {})
    assert square.timeline.flops == 2 * 8192**3
    assert 2 * 8192**3 / 459e12 <= square.timeline.seconds < 2 * (2 * 8192**3 / 459e12)
    row = compile_program(jax.jit(jnp.matmul).lower(shape(8, 16384), shape(16384, 16384)), mesh, topology, {})
    weights = 2 * 16384**2
    assert weights / 2765e9 <= row.timeline.seconds < 2 * weights / 2765e9
