"""Plans of serving: a tiny model's on devices that are here, times by hand from programs written by hand, and what does not fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jaxtyping
import pytest

from moejax.cache_config import CacheConfig
from moejax.config import MeshConfig, ModelConfig, UserError
from moejax.planning.chips import CHIPS
from moejax.planning.compiled import Compiled
from moejax.planning.program import read_program
from moejax.planning.timeline import walk
from moejax.planning.topology import Topology, open_topology
from moejax.serving import plan
from moejax.serving.decoding import STEPS
from moejax.serving.plan import plan_serving
from moejax.serving.plan_meshes import weigh_mesh
from moejax.serving.plan_text import tell_plan

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=4, max_length=64
)
V5P = CHIPS["v5p"]

# A call of decode as a TPU's compiler might write it: 512 MB copied before the loop, and in the loop, whose trips nobody knows, three
# layers that read 256 MB each and write one row of 1 kB into a cache of 256 MB.
PROGRAM = """
HloModule decode

%scatter (old: bf16[131072,1024], places: s32[1], row: bf16[1,512]) -> bf16[131072,1024] {
  %old = bf16[131072,1024]{1,0} parameter(0)
  %places = s32[1]{0} parameter(1)
  %row = bf16[1,512]{1,0} parameter(2)
  ROOT %new = bf16[131072,1024]{1,0} scatter(%old, %places, %row), update_window_dims={1}
}

%layer (state.1: (s32[], bf16[131072,1024], s32[1], bf16[1,512])) -> (s32[], bf16[131072,1024], s32[1], bf16[1,512]) {
  %state.1 = (s32[], bf16[131072,1024]{1,0}, s32[1]{0}, bf16[1,512]{1,0}) parameter(0)
  %cache.1 = bf16[131072,1024]{1,0} get-tuple-element(%state.1), index=1
  %places.1 = s32[1]{0} get-tuple-element(%state.1), index=2
  %row.1 = bf16[1,512]{1,0} get-tuple-element(%state.1), index=3
  %written = bf16[131072,1024]{1,0} fusion(%cache.1, %places.1, %row.1), kind=kCustom, calls=%scatter
  %read = bf16[]{} reduce(%written), dimensions={0,1}
  ROOT %next.1 = (s32[], bf16[131072,1024]{1,0}, s32[1]{0}, bf16[1,512]{1,0}) tuple(%written, %places.1, %row.1)
}

%until.1 (state.2: (s32[])) -> pred[] {
  %three = s32[] constant(3)
}

%token (state.3: (s32[], bf16[131072,1024], s32[1], bf16[1,512])) -> (s32[], bf16[131072,1024], s32[1], bf16[1,512]) {
  %state.3 = (s32[], bf16[131072,1024]{1,0}, s32[1]{0}, bf16[1,512]{1,0}) parameter(0)
  ROOT %layers = (s32[], bf16[131072,1024]{1,0}, s32[1]{0}, bf16[1,512]{1,0}) while(%state.3), condition=%until.1, body=%layer
}

%until (state.4: (s32[], s32[])) -> pred[] {
  %state.4 = (s32[], s32[]) parameter(0)
}

ENTRY %main (given: bf16[131072,1024]) -> bf16[131072,1024] {
  %given = bf16[131072,1024]{1,0} parameter(0)
  %copied = bf16[131072,1024]{1,0} copy(%given)
  ROOT %tokens = (s32[], bf16[131072,1024]{1,0}, s32[1]{0}, bf16[1,512]{1,0}) while(%copied), condition=%until, body=%token
}
"""
CACHE_BYTES = 131072 * 1024 * 2


@pytest.fixture(autouse=True)
def unchecked():
    """Without the checks of types at every call: a cache of shapes has no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def on_v5p() -> Topology:
    """The simulated devices, said to be v5p."""
    return dataclasses.replace(open_topology("local"), chip=V5P, shape=(2, 2, 2))


def pretend(needed=None, text=PROGRAM):
    """A compiler that gives the program above; it needs `needed` bytes, of a mesh its weights and cache and 1 GB where that is None."""

    def compile_both(config, mesh, topology, sizes):
        load = weigh_mesh(config, mesh, sizes.batch, sizes.context, sizes.cache)
        total = load.held + 10**9 if needed is None else needed
        if total > V5P.hbm_bytes:
            return dict.fromkeys(("prefill", "decode"), Compiled(1.0, needed_bytes=total, fits=False))
        program = read_program(text)
        compiled = Compiled(
            1.0, load.held, 0, total - load.held, 0, needed_bytes=total, program=program, timeline=walk(program, mesh, topology)
        )
        return dict.fromkeys(("prefill", "decode"), compiled)

    return compile_both


def test_a_token_takes_the_loop_s_body_and_its_share_of_what_stands_around(monkeypatch):
    monkeypatch.setattr(plan, "_compile", pretend())
    made = plan_serving(TINY, MeshConfig(fsdp=1, expert=4, tensor=2), on_v5p(), 8, 64, 16, CacheConfig())
    decode, bandwidth = made["decode"], V5P.hbm_bytes_per_second
    row_bytes = 512 * 2
    body = 3 * (CACHE_BYTES + 2 + 4 + 2 * row_bytes) / bandwidth  # a scatter moves the row, and not the cache
    assert decode["loop_body_seconds"] == pytest.approx(body, rel=1e-4)
    assert decode["around_loop_seconds"] == pytest.approx(2 * CACHE_BYTES / bandwidth)
    assert decode["predicted_seconds"] == pytest.approx(body + 2 * CACHE_BYTES / bandwidth / STEPS, rel=1e-4)
    assert decode["predicted_tokens_per_second"] == pytest.approx(8 / decode["predicted_seconds"])
    assert made["prefill"]["predicted_tokens_per_second"] == pytest.approx(8 * 16 / (body + 2 * CACHE_BYTES / bandwidth), rel=1e-4)


def test_the_limit_is_bytes_at_hbm_s_bandwidth(monkeypatch):
    """Per device of expert 4 x tensor 2, batch 8: one expert of four, half of it; half of attention, dense MLP and head."""
    monkeypatch.setattr(plan, "_compile", pretend())
    made = plan_serving(TINY, MeshConfig(fsdp=1, expert=4, tensor=2), on_v5p(), 8, 64, 16, CacheConfig())
    attention, dense, router, expert, head = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 32, 32 * 4, 3 * 32 * 16, 64 * 32
    touched = 1 - (1 - 2 / 4) ** 8
    weights = 4 * ((attention + dense + head) / 2 + router + 4 * 32 + touched * expert / 2)
    cache = 4 * 2 * (8 / 4) * 64 * (2 / 2) * 8
    decode = made["decode"]
    assert decode["bytes_to_read"] == {"weights": pytest.approx(weights), "cache": cache, "total": pytest.approx(weights + cache)}
    limit = 8 * V5P.hbm_bytes_per_second / (weights + cache)
    assert decode["bandwidth_limit_tokens_per_second"] == pytest.approx(limit)
    assert decode["fraction_of_bandwidth_limit"] == pytest.approx(decode["predicted_tokens_per_second"] / limit)
    assert decode["bandwidth_limit_nothing_twice_tokens_per_second"] > limit


@pytest.mark.slow
def test_a_tiny_model_on_the_devices_at_hand():
    """Compiled, with sums of bytes that are those of the arrays, and no times, as nothing is known of such devices."""
    made = plan_serving(TINY, MeshConfig(data=2, fsdp=1, expert=2, tensor=2), open_topology("local"), 8, 64, 16, CacheConfig())
    assert json.loads(json.dumps(made)) == made
    assert made["fits"] and made["mesh"] == {"data": 2, "expert": 2, "tensor": 2} and made["devices"] == 8
    parts = made["bytes_per_device"]
    attention, dense, router, expert, table = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 32, 32 * 4, 3 * 32 * 16, 64 * 32
    assert parts["weights"] == 4 * ((attention + dense + 2 * table) // 2 + router + 4 * 32 + 4 * expert // 4)
    assert parts["cache"] == 4 * 2 * 2 * 64 * 8 + 8 * 4
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert parts["temporaries"] > 0 and 0 <= parts["other"] < 2000
    assert made["decode"]["predicted_seconds"] is None and made["decode"]["bandwidth_limit_tokens_per_second"] is None
    assert {made[name]["dispatch"] for name in ("prefill", "decode")} == {"gather"}
    assert "prefill (dispatch gather" in "\n".join(tell_plan(made))


def test_what_does_not_fit_says_by_how_much_and_names_the_nearest_mesh(monkeypatch):
    config = dataclasses.replace(TINY, hidden_size=8192, intermediate_size=16384, num_layers=16, num_experts=8)
    monkeypatch.setattr(plan, "_compile", pretend())
    made = plan_serving(config, MeshConfig(data=4, fsdp=1, tensor=2), on_v5p(), 8, 64, 16, CacheConfig())
    assert not made["fits"] and made["decode"].keys().isdisjoint({"predicted_seconds", "collectives"})
    assert made["bytes_per_device"]["temporaries"] == 10**9
    nearest = made["nearest_mesh"]
    assert nearest["fits"] and nearest["mesh"] == {"data": 2, "expert": 2, "tensor": 2} and nearest["needed_bytes"] <= V5P.hbm_bytes
    lines = "\n".join(tell_plan(made))
    over = (made["bytes_per_device"]["total"] - V5P.hbm_bytes) / 2**30
    assert f"DOES NOT FIT, {over:.2f} GiB too much of 95.00" in lines
    assert "the nearest that fits: --mesh.data 2 --mesh.expert 2 --mesh.tensor 2" in lines


def test_where_no_mesh_fits_the_plan_says_so(monkeypatch):
    config = dataclasses.replace(TINY, hidden_size=8192, intermediate_size=16384, num_layers=96, num_experts=8)
    monkeypatch.setattr(plan, "_compile", pretend())
    made = plan_serving(config, None, on_v5p(), 8, 64, 16, CacheConfig())
    assert not made["nearest_mesh"]["fits"] and made["nearest_mesh"]["least_weights_and_cache_bytes"] > V5P.hbm_bytes
    assert "no mesh of 8 devices was found that fits" in "\n".join(tell_plan(made))


def test_weights_that_a_program_does_not_take_lie_there_all_the_same():
    load = weigh_mesh(TINY, plan.open_mesh(TINY, MeshConfig(fsdp=1, tensor=2, data=4), jax.devices()), 8, 64, CacheConfig())
    without_head = Compiled(1.0, argument_bytes=load.held - 4096, temporary_bytes=500, program_bytes=20, needed_bytes=load.held - 3576)
    assert plan._divide_bytes(without_head, load)["total"] == load.held + 520


@pytest.mark.parametrize(("sizes", "message"), [((0, 64, 16), "batch=0"), ((8, 0, 16), "context=0"), ((8, 64, 0), "chunk=0")])
def test_sizes_that_make_no_plan(sizes, message):
    with pytest.raises(UserError, match=message):
        plan_serving(TINY, None, open_topology("local"), *sizes, CacheConfig())


@pytest.mark.slow
def test_for_tpus(run_command, tmp_path):
    """Decode copies no expert's weights and gathers no table, and what is predicted lies below the limit."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed")
    (tmp_path / "two_layers.py").write_text(
        "import dataclasses\nfrom moejax.config import RunConfig\nfrom moejax.families.arctic import ARCTIC_480B\n"
        "def config():\n    return RunConfig(model=dataclasses.replace(ARCTIC_480B, num_layers=2))\n"
    )
    program, out = Path(__file__).resolve().parents[2] / "sample.py", tmp_path / "plan.json"
    flags = ["--plan", "v5p:2x2x2", "--batch-size", "16", "--plan-context", "1024", "--mesh.expert", "2", "--mesh.tensor", "4"]
    ended = run_command(["python", program, "--checkpoint", "two_layers.py", *flags, "--plan-json", out], cwd=tmp_path, timeout=600)
    assert ended.returncode == 0, ended.stderr
    made = json.loads(out.read_text())
    decode = made["decode"]
    assert made["fits"] and made["libtpu"] and made["mesh"] == {"expert": 2, "tensor": 4}
    assert decode["needed_bytes"] - made["bytes_per_device"]["weights"] < 0.3e9  # a layer's experts are 3.3 GB on a device
    assert 0.1 < decode["fraction_of_bandwidth_limit"] < 1
    assert sum(row["bytes"] for row in decode["collectives"] if row["kind"] == "all-gather") < 32_000 * 7168 * 2 / 10
    assert decode["around_loop_seconds"] < decode["loop_body_seconds"] / 4
    assert made["prefill"]["predicted_tokens_per_second"] > decode["predicted_tokens_per_second"]
