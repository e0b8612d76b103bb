"""Schedules written by hand: what waits for which collective, and how much of one is hidden behind work."""

import pytest

from moejax.planning.chips import HOP_SECONDS
from moejax.planning.program import read_program
from moejax.planning.timeline import Timeline, summarise_collectives, walk
from tests.planning.slices import make_mesh, make_topology

V5P = make_topology("v5p:4x4x4")
MESH = make_mesh(V5P, x=4, y=4, z=4)
PEAK, BANDWIDTH, LINK, CLOCK = 459e12, 2765e9, 90e9, 1.75e9

X = "replica_groups=[16,4]<=[4,16]T(1,0)"  # one dimension of the torus
Y = "replica_groups=[16,4]<=[4,4,4]T(0,2,1)"
FORWARD = 'metadata={op_name="jit(step)/jvp(Transformer)/moe/all_to_all"}'
BACKWARD = 'metadata={op_name="jit(step)/transpose(jvp(Transformer))/checkpoint/rematted_computation/moe/all_to_all"}'
SIDE = 4096
TOKENS = f"bf16[{SIDE},{SIDE}]"
ROWS = SIDE * SIDE * 2  # bytes
MATMUL = 2 * SIDE**3 / PEAK
HOPS = 2 * HOP_SECONDS  # half a ring of four
EXCHANGE = ROWS * 4 / 8 / LINK + HOPS
GATHER = ROWS * 3 / 4 / (2 * LINK) + HOPS


def schedule(*lines: str, before: str = "", topology=V5P, mesh=MESH) -> Timeline:
    """The totals of a program with these instructions, which may use %a and %b."""
    text = "\n".join(
        [
            "HloModule m, is_scheduled=true", before, "ENTRY %main () -> f32[] {", f"  %a = {TOKENS}{{1,0}} parameter(0)",
            f"  %b = {TOKENS}{{1,0}} parameter(1)", *(f"  {line}" for line in lines), "}",
        ]
    )  # fmt: skip
    return walk(read_program(text), mesh, topology)


def matmul(name: str, operand: str = "a") -> str:
    return f"%{name} = {TOKENS}{{1,0}} dot(%{operand}, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"


def start(name: str, groups: str = X, what: str = FORWARD, operand: str = "a") -> str:
    return f"%{name} = (({TOKENS}), {TOKENS}, u32[]{{:S(2)}}) all-to-all-start(%{operand}), channel_id=1, {groups}, {what}"


def done(name: str, started: str) -> str:
    return f"%{name} = {TOKENS}{{1,0}} all-to-all-done(%{started})"


# Work by itself.


def test_a_plain_matmul_takes_its_flops_at_the_chip_s_peak():
    """bf16 8192^3 on v5p, whose published peak is 459 TFLOP/s."""
    side = 8192
    program = f"""HloModule m
ENTRY %main () -> f32[] {{
  %a = bf16[{side},{side}]{{1,0}} parameter(0)
  %b = bf16[{side},{side}]{{1,0}} parameter(1)
  ROOT %c = bf16[{side},{side}]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}"""
    found = walk(read_program(program), MESH, V5P)
    assert found.flops == 2 * side**3
    assert found.seconds == found.compute_seconds == found.roofline_seconds == 2 * side**3 / 459e12
    assert found.hbm_bytes == 3 * 2 * side**2
    assert found.hbm_seconds == 3 * 2 * side**2 / 2765e9


def test_a_narrow_matmul_takes_its_bytes_at_hbm_s_bandwidth():
    """A matrix times one row is as slow as reading the matrix: 2765 GB/s on v5p."""
    found = schedule(
        f"%x = bf16[1,{SIDE}]{{1,0}} parameter(2)",
        f"ROOT %c = bf16[1,{SIDE}]{{1,0}} dot(%x, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}",
    )
    assert found.seconds == (ROWS + 2 * 2 * SIDE) / 2765e9 > found.flops_seconds


def test_the_compiler_s_estimate_counts_where_it_is_longer():
    slow, quick = (
        schedule(f'{matmul("c")}, backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}') for cycles in (1_750_000, 1000)
    )
    assert slow.seconds == slow.compute_seconds == 1e-3 > MATMUL
    assert slow.roofline_seconds == quick.seconds == MATMUL


def test_copies_beside_the_work_take_no_time():
    found = schedule(
        f"%s = ({TOKENS}{{1,0:S(1)}}, {TOKENS}{{1,0}}, u32[]) copy-start(%a)", matmul("c"), f"%d = {TOKENS}{{1,0:S(1)}} copy-done(%s)"
    )
    assert found.seconds == MATMUL
    assert found.hbm_bytes == ROWS + 3 * ROWS


# One collective.


def test_an_asynchronous_exchange_is_hidden_behind_the_work_between():
    found = schedule(start("s"), matmul("c"), done("d", "s"))
    (exchange,) = found.collectives
    assert (exchange.kind, exchange.is_async, exchange.bytes, exchange.count) == ("all-to-all", True, ROWS, 1)
    assert exchange.seconds == pytest.approx(EXCHANGE)
    assert MATMUL > EXCHANGE and found.hidden_exchange("forward") == 1
    assert found.seconds == pytest.approx(MATMUL)
    assert found.waiting_seconds == 0


def test_of_more_bytes_than_the_work_covers_the_rest_is_waited_for():
    """Hidden is exactly min(link, work) / link, and the step is as long as the link is busy."""
    found = schedule(
        f"%wide = bf16[4,{SIDE},{SIDE}]{{2,1,0}} parameter(2)",
        f"%s = ((bf16[4,{SIDE},{SIDE}]), bf16[4,{SIDE},{SIDE}]) all-to-all-start(%wide), {X}, {FORWARD}",
        matmul("c"),
        f"%d = bf16[4,{SIDE},{SIDE}] all-to-all-done(%s)",
    )
    link = 4 * (EXCHANGE - HOPS) + HOPS
    assert link > MATMUL
    assert found.hidden_exchange("forward") == pytest.approx(min(link, MATMUL) / link)
    assert found.seconds == pytest.approx(link)
    assert found.waiting_seconds == pytest.approx(link - MATMUL)
    assert found.link_seconds == pytest.approx(link)


def test_an_end_directly_behind_the_start_hides_nothing():
    """Of the same instructions in another order: the figure falls to nothing, and the step is longer by what had been hidden."""
    apart, together = schedule(start("s"), matmul("c"), done("d", "s")), schedule(start("s"), done("d", "s"), matmul("c"))
    assert (apart.hidden_exchange("forward"), together.hidden_exchange("forward")) == (1, 0)
    assert together.seconds == pytest.approx(apart.seconds + apart.collectives[0].hidden)
    assert together.waiting_seconds == pytest.approx(EXCHANGE)
    assert together.collectives[0].is_async  # by name only


def test_work_before_and_behind_hides_nothing():
    found = schedule(matmul("c"), start("s"), done("d", "s"), matmul("e"))
    assert found.hidden_exchange("forward") == 0
    assert found.seconds == pytest.approx(2 * MATMUL + EXCHANGE)


def test_one_that_is_not_asynchronous_stops_the_cores():
    found = schedule(matmul("c"), f"%e = {TOKENS}{{1,0}} all-to-all(%a), {X}, {FORWARD}", matmul("f"))
    assert found.seconds == pytest.approx(2 * MATMUL + EXCHANGE)
    assert found.waiting_seconds == pytest.approx(EXCHANGE)
    assert found.hidden_exchange("forward") == 0
    assert not found.collectives[0].is_async


def test_one_that_nobody_waits_for_ends_with_the_program():
    assert schedule(start("s")).seconds == pytest.approx(EXCHANGE)


def test_without_exchanges_nothing_can_be_said_of_them():
    assert schedule(matmul("c")).hidden_exchange("forward") is None


def test_forward_and_backward_are_told_apart_by_where_they_come_from():
    found = schedule(
        start("s"), matmul("c"), done("d", "s"), start("t", what=BACKWARD), done("e", "t"), start("u", what="channel_id=2"), done("f", "u")
    )
    assert [one.direction for one in found.collectives] == ["forward", "backward", "other"]
    assert (found.hidden_exchange("forward"), found.hidden_exchange("backward")) == (1, 0)


# Several.


def test_two_on_one_dimension_queue():
    found = schedule(start("s"), start("t", operand="b"), done("d", "s"), done("e", "t"))
    assert found.seconds == pytest.approx(2 * EXCHANGE)
    assert found.collectives[0].group.spans == found.collectives[1].group.spans


def test_two_on_different_dimensions_do_not():
    found = schedule(start("s"), start("t", groups=Y, operand="b"), done("d", "s"), done("e", "t"))
    assert found.seconds == pytest.approx(EXCHANGE)
    assert {one.group.spans[0].dimension for one in found.collectives} == {0, 1}
    assert found.link_seconds == pytest.approx(2 * EXCHANGE)


def test_one_that_stops_the_cores_waits_for_its_links_too():
    found = schedule(start("s"), f"%e = {TOKENS}{{1,0}} all-to-all(%b), {X}", done("d", "s"))
    assert found.seconds == pytest.approx(2 * EXCHANGE)


def test_a_permutation_and_a_sum_are_found_where_they_stand():
    pairs = ",".join(f"{{{place},{(place + 16) % 64}}}" for place in range(64))
    found = schedule(
        f"%p = ({TOKENS}, {TOKENS}, u32[], u32[]) collective-permute-start(%a), channel_id=1, source_target_pairs={{{pairs}}}",
        f"%q = {TOKENS} collective-permute-done(%p)",
        f"%r = {TOKENS} all-reduce(%a), {X}, to_apply=%add",
    )
    permutation, total = found.collectives
    assert permutation.seconds == pytest.approx(ROWS / LINK + HOP_SECONDS)
    assert total.seconds == pytest.approx(2 * GATHER)
    assert list(summarise_collectives(found.collectives)) == ["collective-permute", "all-reduce"]  # the longest first


# As TPUs write those that go on inside fusions.

SHARD = f"bf16[{SIDE // 4},{SIDE}]"
FLIGHT = f"({SHARD}{{1,0}}, {TOKENS}{{1,0}}, u32[]{{:S(2)}})"
BODIES = f"""
%starts (p: {SHARD}) -> ({SHARD}, {TOKENS}, u32[]) {{
  %p = {SHARD}{{1,0}} parameter(0)
  %g = {TOKENS}{{1,0}} all-gather(%p), {X}, dimensions={{0}}, {FORWARD}
  ROOT %cc = {FLIGHT} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p: {SHARD}, q: {TOKENS}, r: {TOKENS}, s: {TOKENS}) -> ({TOKENS}, {SHARD}, {TOKENS}) {{
  %p = {SHARD}{{1,0}} parameter(0)
  %q = {TOKENS}{{1,0}} parameter(1)
  %r = {TOKENS}{{1,0}} parameter(2)
  %s = {TOKENS}{{1,0}} parameter(3)
  %g = {TOKENS}{{1,0}} all-gather(%p), {X}, dimensions={{0}}, {FORWARD}
  %c = {TOKENS}{{1,0}} convolution(%r, %s), dim_labels=bf_io->bf
  ROOT %t = ({TOKENS}{{1,0}}, {SHARD}{{1,0}}, {TOKENS}{{1,0}}) tuple(%c, %p, %g)
}}

%ends (p: {SHARD}, q: {TOKENS}) -> {TOKENS} {{
  %p = {SHARD}{{1,0}} parameter(0)
  %q = {TOKENS}{{1,0}} parameter(1)
  %g = {TOKENS}{{1,0}} all-gather(%p), {X}, dimensions={{0}}, {FORWARD}
  ROOT %cc = {TOKENS}{{1,0}} custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
}}

%scatters (p: {TOKENS}) -> {SHARD} {{
  %p = {TOKENS}{{1,0}} parameter(0)
  %z = s32[] constant(0)
  %sum = {TOKENS}{{1,0}} all-reduce(%p), {X}, to_apply=%add
  ROOT %slice = {SHARD}{{1,0}} dynamic-slice(%sum, %z, %z), dynamic_slice_sizes={{1024,4096}}
}}
"""
STARTS = (
    f"%w = {SHARD}{{1,0}} parameter(2)",
    f"%async-collective-start.14 = {FLIGHT} fusion(%w), kind=kCustom, calls=%starts",
    f"%g0 = {SHARD}{{1,0}} get-tuple-element(%async-collective-start.14), index=0",
    f"%g1 = {TOKENS}{{1,0}} get-tuple-element(%async-collective-start.14), index=1",
)
CARRIES = (
    f"%f = ({TOKENS}{{1,0}}, {SHARD}{{1,0}}, {TOKENS}{{1,0}}) fusion(%g0, %g1, %a, %b), kind=kOutput, calls=%async_collective_fusion.1",
)
ENDS = (f"%async-collective-done.14 = {TOKENS}{{1,0}} fusion(%g0, %g1), kind=kCustom, calls=%ends",)


def test_a_gather_inside_fusions_is_one_and_is_hidden_by_the_matmul_that_carries_it():
    found = schedule(*STARTS, *CARRIES, *ENDS, before=BODIES)
    (gather,) = found.collectives
    assert (gather.kind, gather.bytes, gather.is_async, gather.direction) == ("all-gather", ROWS, True, "forward")
    assert gather.seconds == pytest.approx(GATHER) and gather.hidden == gather.seconds
    assert found.flops == 2 * SIDE**3
    assert found.seconds == pytest.approx(max(MATMUL, GATHER))
    assert found.hbm_bytes == 3 * ROWS  # the matmul's own


def test_without_the_matmul_it_is_waited_for():
    found = schedule(*STARTS, *ENDS, before=BODIES)
    assert found.seconds == found.waiting_seconds == pytest.approx(GATHER)
    assert found.collectives[0].hidden == 0


OFFLOADED = f"""
%called (p: {SHARD}, q: token[]) -> {TOKENS} {{
  %q = token[] parameter(1)
  %p = {SHARD}{{1,0}} parameter(0)
  ROOT %g = {TOKENS}{{1,0}} all-gather(%p), {X}, dimensions={{0}}, {FORWARD}
}}, execution_thread="sparsecore"
"""
CALL = (
    '%ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"',
    f'%s = (({SHARD}, token[]), {TOKENS}) call-start(%w, %ready), async_execution_thread="sparsecore", to_apply=%called',
)
LOADED_CALL = (
    '%l = ((), (), (s32[9])) custom-call-start(), async_execution_thread="sparsecore", called_computations={%called}',
    f"%s = (({SHARD}), {TOKENS}, (s32[9])) custom-call-update(%l, %w), output_to_operand_aliasing={{{{2,0}}: (0, {{2,0}})}}",
)


@pytest.mark.parametrize(("begins", "ends"), [(CALL, "call-done"), (LOADED_CALL, "custom-call-done")])
def test_a_gather_that_sparse_cores_run_is_hidden_by_the_work_meanwhile(begins, ends):
    begins, ends = (f"%w = {SHARD}{{1,0}} parameter(2)", *begins), f"%d = {TOKENS}{{1,0}} {ends}(%s)"
    found, waited = schedule(*begins, matmul("c"), ends, before=OFFLOADED), schedule(*begins, ends, before=OFFLOADED)
    (one,) = found.collectives
    assert (one.kind, one.bytes, one.is_async, one.direction) == ("all-gather", ROWS, True, "forward")
    assert one.hidden == one.seconds == pytest.approx(GATHER)
    assert found.seconds == pytest.approx(max(MATMUL, GATHER))
    assert waited.seconds == waited.waiting_seconds == pytest.approx(GATHER)


def test_a_sum_that_keeps_a_slice_is_a_scatter():
    found = schedule(f"%s = {SHARD}{{1,0}} fusion(%a), kind=kCustom, calls=%scatters", before=BODIES)
    (scatter,) = found.collectives
    assert (scatter.kind, scatter.bytes, scatter.is_async) == ("reduce-scatter", ROWS, False)
    assert found.seconds == pytest.approx(GATHER)


# Loops and branches.

LOOP = f"""
%condition (p: s32[]) -> pred[] {{
  %p = s32[] parameter(0)
  %n = s32[] constant(35)
  ROOT %lt = pred[] compare(%p, %n), direction=LT
}}

%body (p: {TOKENS}) -> {TOKENS} {{
  %a = {TOKENS}{{1,0}} parameter(0)
  %b = {TOKENS}{{1,0}} parameter(1)
  {start("s")}
  {matmul("c")}
  ROOT {done("d", "s")}
}}

%little (p: {TOKENS}) -> {TOKENS} {{
  %a = {TOKENS}{{1,0}} parameter(0)
  %b1 = {TOKENS}{{1,0}} bitcast(%a)
  %b2 = {TOKENS}{{1,0}} bitcast(%b1)
  %b3 = {TOKENS}{{1,0}} bitcast(%b2)
  %b4 = {TOKENS}{{1,0}} bitcast(%b3)
  ROOT %b5 = {TOKENS}{{1,0}} bitcast(%b4)
}}
"""


def test_loops_multiply():
    found = schedule(f"%w = {TOKENS} while(%a), condition=%condition, body=%body", before=LOOP)
    assert found.seconds == pytest.approx(35 * MATMUL)
    assert found.flops == 35 * 2 * SIDE**3
    assert found.hbm_bytes == 35 * 3 * ROWS
    assert (len(found.collectives), found.collectives[0].count) == (1, 35)
    assert found.link_seconds == pytest.approx(35 * EXCHANGE)
    assert found.hidden_exchange("forward") == 1


def test_what_is_on_its_way_meanwhile_is_hidden_behind_a_loop():
    loop = f"%w = {TOKENS} while(%a), condition=%condition, body=%body"
    found = schedule(start("s", what=BACKWARD), loop, done("d", "s"), before=LOOP)
    assert found.hidden_exchange("backward") == 1
    assert found.seconds == pytest.approx(35 * MATMUL)


def test_of_a_conditional_the_branch_that_takes_longer_runs():
    conditional = f"%w = {TOKENS} conditional(%a, %a, %a), branch_computations={{%little, %body}}"
    found = schedule(conditional, before=LOOP)
    assert found.seconds == pytest.approx(MATMUL)
    assert len(found.collectives) == 1


def test_of_a_machine_without_a_chip_flops_are_counted_and_no_time():
    import jax

    from moejax.planning.topology import Topology
    from moejax.sharding import make_mesh as make_real_mesh

    local = Topology("local", tuple(jax.devices()), None)
    found = schedule(
        start("s", groups="replica_groups=[2,4]<=[8]"), matmul("c"), done("d", "s"), topology=local, mesh=make_real_mesh(expert=4)
    )
    assert (found.flops, found.seconds, found.hidden_exchange("forward")) == (2 * SIDE**3, 0, None)
    assert found.collectives[0].group.axes == ("expert",)


# Between slices.


def test_what_goes_between_slices_is_covered_by_work_too():
    """A reduction over the slices is a send and a receive through the hosts; each chip's part goes over the network twice, less its own."""
    topology = make_topology("2*v5p:2x2x2")
    mesh = make_mesh(topology, data=2, expert=8)
    transfer = 'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    seconds = 2 * ROWS / 2 / 6.25e9
    found = schedule(
        "%token = token[] after-all()",
        f"%recv = ({TOKENS}, u32[], token[]) recv(%token), channel_id=1, {transfer}",
        f"%send = ({TOKENS}, u32[], token[]) send(%a, %token), channel_id=2, {transfer}",
        matmul("work"),
        "%sent = token[] send-done(%send), channel_id=2",
        f"%received = ({TOKENS}, token[]) recv-done(%recv), channel_id=1",
        topology=topology, mesh=mesh,
    )  # fmt: skip
    (one,) = found.collectives
    assert (one.kind, one.group.axes, one.is_async, one.bytes) == ("all-reduce", ("data",), True, ROWS)
    assert one.seconds == pytest.approx(seconds) and one.hidden == pytest.approx(MATMUL)
    assert found.seconds == pytest.approx(seconds)  # it takes longer than the work


def test_a_collective_whose_path_is_lost_has_that_of_what_it_moves():
    bare = f"%go = (({TOKENS}), {TOKENS}, u32[]{{:S(2)}}) all-to-all-start(%made), channel_id=1, {X}"
    found = schedule(f"{matmul('made')}, {BACKWARD}", bare, done("came", "go"))
    assert found.hidden_exchange("backward") == 0 and found.hidden_exchange("forward") is None
