"""What the check of programs for TPUs finds in a text, and one program compiled where libtpu is there."""

import importlib.util
import json

import pytest

from moejax.bench import tpu_compile
from moejax.bench.tpu_compile import PROGRAMS, SHAPE, check_sizes, check_text, count_collectives
from moejax.config import UserError
from moejax.sharding import make_mesh

GOOD = """
  %gathered.1 = bf16[1,2,640,512]{3,2,1,0:T(8,128)(2,1)} all-gather(%weight), channel_id=1, dimensions={3}
  %sent.1 = ((bf16[4,2,512,512]{3,2,1,0}), bf16[4,2,512,512]{3,2,1,0}, u32[]) all-to-all-start(%rows), channel_id=2, dimensions={0}
  %start.1 = (f32[8]{0}, f32[16]{0}) all-gather-start(%norms), channel_id=3, dimensions={0}
  %done.1 = f32[16]{0} all-gather-done(%start.1)
  %kernel.1 = bf16[8,384,128]{2,1,0} custom-call(%q), metadata={op_name="splash_mha_fwd"}
  ROOT %sum.1 = f32[] all-reduce(%loss), channel_id=4, to_apply=%add
"""


def test_a_good_program_has_no_failures():
    assert check_text(GOOD, PROGRAMS["capacity"], SHAPE) == []
    assert count_collectives(GOOD) == {"all-gather": 2, "all-reduce": 1, "all-to-all": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%g = bf16[1,8,640,512]{3,2,1,0} all-gather(%weight), dimensions={1}", "all-gather of [1, 8, 640, 512] brings a device more"),
        ("%g = (bf16[2,64]{1,0}, bf16[2,2,640,512]{3,2,1,0}) all-gather-start(%w), dimensions={0}", "brings a device more"),
        ("%s = (f32[8]{0}, u32[], token[]) send(%x, %token), channel_id=9, is_host_transfer=true", "talks to the host"),
        ("%s = (f32[8]{0}, token[]) infeed(%token)", "has a infeed"),
        ('%c = f32[8]{0} custom-call(%x), custom_call_target="xla_python_cpu_callback"', "talks to the host"),
    ],
)
def test_what_must_not_be_in_a_program(line, message):
    failures = check_text(GOOD + "  " + line, PROGRAMS["capacity"], SHAPE)
    assert any(message in failure for failure in failures), failures


def test_a_collective_that_is_missing():
    assert check_text(GOOD, PROGRAMS["ragged"], SHAPE) == ["there is no ragged-all-to-all in the program"]


def test_attention_that_is_not_a_kernel():
    assert check_text(GOOD.replace("splash_mha", "dot"), PROGRAMS["capacity"], SHAPE) == ["there is no splash_mha_fwd in the program"]
    scores = "  %s = f32[2,8,384,384]{3,2,1,0} fusion(%q), kind=kOutput"
    assert check_text(GOOD + scores, PROGRAMS["capacity"], SHAPE) == ["the program has all scores of a row, [2, 8, 384, 384]"]
    assert "all scores" not in " ".join(check_text(GOOD + scores, PROGRAMS["tensor"], SHAPE))


def test_sizes_that_are_not_those_of_the_mesh():
    mesh = make_mesh(expert=4, fsdp=2)
    good = {"expert_parts": 8.0, "argument_bytes": 10_500_000, "state_bytes_per_device": 10_000_000}
    assert check_sizes(good, mesh) == []
    assert "lie in 2.0 parts; expected 8" in check_sizes(good | {"expert_parts": 2.0}, mesh)[0]
    assert "a device takes 80000000 bytes" in check_sizes(good | {"argument_bytes": 80_000_000}, mesh)[0]


def test_without_libtpu_it_says_what_to_install():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    with pytest.raises(UserError, match=r'needs libtpu.*pip install "moejax\[tpu\]"'):
        tpu_compile.topology_devices("v5p:2x2x2")


def test_a_program_that_is_none():
    with pytest.raises(UserError, match="programs has 'raged'; expected some of capacity, gather, ragged, tensor"):
        tpu_compile.Arguments(programs=("raged",))


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "program"), [("v5p:2x2x2", "ragged"), ("v6e:2x4", "gather")])
def test_one_program_compiles(run_command, topology, program):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed")
    command = ["python", "-m", "moejax.bench", "tpu_compile", "--topology", topology, "--programs", program, "--json", "-"]
    result = run_command(command, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["programs"][program]["failures"] == []
