"""Collectives' time: the worked numbers of "How to Scale Your Model" (Austin et al. 2025), groups as XLA writes them, where they lie.

The book leaves out the (n - 1) / n that a device already has; it stands here wherever its numbers do.
"""

import math
from dataclasses import replace

import pytest

from moejax.planning.chips import HOP_SECONDS
from moejax.planning.links import (
    KINDS,
    Group,
    Span,
    describe_group,
    find_group,
    find_pairs,
    find_permutation,
    first_group,
    kind_of,
    moved_bytes,
    transfer_seconds,
)  # fmt: skip
from moejax.planning.program import read_program
from tests.planning.slices import make_mesh, make_topology

HOPS = 10 * HOP_SECONDS  # more than any hops here take


def group_along(name: str, *dimensions: int) -> tuple[Group, object]:
    """All chips along these dimensions of a topology, and the topology."""
    topology = make_topology(name)
    mesh = make_mesh(topology, **{"xyz"[place]: size for place, size in enumerate(topology.shape)})
    members = [
        number for number, device in enumerate(topology.devices)
        if all(device.coords[place] == 0 for place in range(len(topology.shape)) if place not in dimensions)
    ]  # fmt: skip
    return find_group(members, mesh, topology), topology


# The book's numbers.


def test_gathering_34_megabytes_over_four_v5e_chips_takes_560_microseconds():
    """Pop quiz 2: bf16[2048, 8192] over an axis of 4, no ring: 560 us, of which a real profile shows 680."""
    group, topology = group_along("v5e:8x4", 1)
    assert group.spans == (Span(1, 4, 1, False),)
    seconds = transfer_seconds("all-gather", 2 * 2048 * 8192, group, topology)
    assert seconds == pytest.approx(560e-6, rel=0.01)
    assert seconds < 680e-6


def test_gathering_a_little_is_a_matter_of_hops():
    """The same quiz, bf16[256, 256]: "3 hops, so this will take roughly 3 * 1us"; three of four shards of 32 kB come beside."""
    group, topology = group_along("v5e:8x4", 1)
    seconds = transfer_seconds("all-gather", 2 * 256 * 256, group, topology)
    assert seconds == pytest.approx(3e-6 + 3 * 32_768 / 45e9)


B, D = 1024, 4096  # question 2: bf16[B, D] on v4p 4x4x4, rings everywhere


@pytest.mark.parametrize(
    ("kind", "bytes_moved", "dimensions", "book"),
    [("all-gather", 2 * B * D / 4, (1,), 23e-6), ("all-gather", 2 * B * D, (0, 1), 46e-6), ("all-reduce", 2 * B * D, (2,), 190e-6)],
)
def test_question_2_on_v4(kind, bytes_moved, dimensions, book):
    group, topology = group_along("v4:4x4x4", *dimensions)
    missing = 1 - 1 / 4 ** len(dimensions)
    seconds = transfer_seconds(kind, bytes_moved, group, topology)
    hops = (2 if kind == "all-reduce" else 1) * 2 * len(dimensions) * HOP_SECONDS
    assert seconds - hops == pytest.approx(book * missing, rel=0.03)  # the book rounds


def test_the_last_part_of_question_2_is_two_hops():
    """256 bytes over a ring of 4: "roughly 2us a good estimate"."""
    group, topology = group_along("v4:4x4x4", 0)
    assert transfer_seconds("all-gather", 256, group, topology) == pytest.approx(2e-6, rel=0.01)


@pytest.mark.parametrize(("name", "dimension", "size"), [("v5p:8x8x16", 0, 8), ("v5p:8x8x16", 2, 16), ("v5e:16x16", 1, 16)])
def test_an_exchange_is_a_quarter_of_a_gather_on_a_ring(name, dimension, size):
    """The table of the chapter's end; V is the whole array, of which a device has V / n."""
    group, topology = group_along(name, dimension)
    whole = 1e9
    gather = transfer_seconds("all-gather", whole, group, topology) - size / 2 * HOP_SECONDS
    exchange = transfer_seconds("all-to-all", whole / size, group, topology) - size / 2 * HOP_SECONDS
    assert exchange == pytest.approx(gather / (1 - 1 / size) / 4)
    assert transfer_seconds("ragged-all-to-all", whole / size, group, topology) == exchange + size / 2 * HOP_SECONDS


@pytest.mark.parametrize(("name", "size"), [("v5p:8x8x16", 8), ("v5e:8x8", 8)])
def test_an_exchange_loads_the_busiest_link_as_routing_by_hand_does(name, size):
    """Every chip sends 1 / n of what it has to each; half of what goes half-way round a ring goes either way."""
    group, topology = group_along(name, 1)
    ring, loads = group.spans[0].is_ring, {}
    for source in range(size):
        for target in range(size):
            ways = {target - source}
            if ring:
                shortest = min((target - source) % size, (source - target) % size)
                ways = {way for way in (shortest, -shortest) if (source + way - target) % size == 0}
            for way in ways:
                for step in range(abs(way)):
                    link = ((source + int(math.copysign(step, way))) % size, way > 0)
                    loads[link] = loads.get(link, 0) + 1 / size / len(ways)
    hops = (size / 2 if ring else size - 1) * HOP_SECONDS
    seconds = transfer_seconds("all-to-all", 1e9, group, topology) - hops
    assert seconds == pytest.approx(max(loads.values()) * 1e9 / topology.chip.link_bytes_per_second)


# Of all kinds.


@pytest.mark.parametrize("kind", KINDS)
def test_time_grows_with_bytes_and_is_nothing_for_one_device(kind):
    group, topology = group_along("v5p:4x4x4", 0)
    assert transfer_seconds(kind, 2e9, group, topology) > transfer_seconds(kind, 1e9, group, topology) > HOPS
    assert transfer_seconds(kind, 1e9, Group(1, (), ()), topology) == 0
    assert transfer_seconds(kind, 1e9, group, replace(topology, chip=None)) == 0


def test_summing_is_scattering_and_gathering():
    group, topology = group_along("v5p:4x4x8", 0, 2)
    scatter, gather, both = (transfer_seconds(kind, 1e8, group, topology) for kind in ("reduce-scatter", "all-gather", "all-reduce"))
    assert both == pytest.approx(scatter + gather)


def test_more_dimensions_carry_more():
    one, topology = group_along("v5p:4x4x4", 0)
    three, _ = group_along("v5p:4x4x4", 0, 1, 2)
    ratio = transfer_seconds("all-gather", 1e9, one, topology) / transfer_seconds("all-gather", 1e9, three, topology)
    assert ratio == pytest.approx(3 * (3 / 4) / (63 / 64), rel=0.01)


# Where groups lie.


def test_a_part_of_a_ring_is_a_line():
    topology = make_topology("v5p:8x4x4")
    mesh = make_mesh(topology, a=2, b=4, rest=16)
    near = find_group([place * 16 for place in range(4)], mesh, topology)  # four neighbours
    assert near.spans == (Span(0, 4, 1, False),) and near.axes == ("b",)
    assert near.spans[0].links == 1


def test_every_second_chip_of_a_ring_is_a_ring_that_shares_its_links():
    topology = make_topology("v5p:8x4x4")
    mesh = make_mesh(topology, a=4, b=2, rest=16)
    apart = find_group([place * 32 for place in range(4)], mesh, topology)
    assert apart.spans == (Span(0, 4, 2, True),) and apart.axes == ("a",)
    alone = Group(4, ("a",), (Span(0, 4, 1, True),))
    assert transfer_seconds("all-gather", 1e9, apart, topology) == pytest.approx(
        2 * transfer_seconds("all-gather", 1e9, alone, topology), rel=1e-3
    )
    assert transfer_seconds("all-to-all", 1e9, apart, topology) == pytest.approx(
        2 * transfer_seconds("all-to-all", 1e9, alone, topology), rel=1e-3
    )


def test_axes_are_those_that_tell_the_devices_apart():
    topology = make_topology("v5p:4x4x4")
    mesh = make_mesh(topology, fsdp=4, expert=16)
    assert find_group(range(16), mesh, topology).axes == ("expert",)
    assert find_group([0, 16, 32, 48], mesh, topology).axes == ("fsdp",)
    assert find_group(range(64), mesh, topology).axes == ("fsdp", "expert")
    assert len(find_group(range(16), mesh, topology).spans) == 2


def test_devices_without_coordinates_have_a_size_and_no_time():
    import jax

    from moejax.planning.topology import Topology
    from moejax.sharding import make_mesh as make_real_mesh

    topology = Topology("local", tuple(jax.devices()), None)
    group = find_group([0, 1, 2, 3], make_real_mesh(expert=4, fsdp=2), topology)
    assert (group.size, group.axes, group.spans) == (4, ("expert",), ())
    assert transfer_seconds("all-gather", 1e9, group, topology) == 0
    assert describe_group(group) == {"devices": 4, "axes": ["expert"], "torus": []}


# Two devices a chip.


def test_the_two_devices_of_a_tpu7x_chip_talk_as_fast_as_all_its_links():
    topology = make_topology("tpu7x:4x4x4")
    mesh = make_mesh(topology, rest=64, core=2)
    pair = find_group([0, 1], mesh, topology)
    assert (pair.spans, pair.on_chip) == ((), 2)
    assert transfer_seconds("all-gather", 1e9, pair, topology) == pytest.approx(0.5e9 / (6 * 90e9))
    assert transfer_seconds("all-reduce", 1e9, pair, topology) == pytest.approx(2 * 0.5e9 / (6 * 90e9))


def test_two_devices_share_their_chip_s_links():
    topology = make_topology("tpu7x:4x4x4")
    mesh = make_mesh(topology, x=4, rest=16, core=2)
    one_core = find_group([place * 32 for place in range(4)], mesh, topology)
    both = find_group([place * 32 + core for place in range(4) for core in range(2)], mesh, topology)
    assert (one_core.on_chip, both.on_chip) == (1, 2)
    # The other cores gather as much over the same links at the same time; where both are of one group, it comes once.
    assert transfer_seconds("all-gather", 1e9, one_core, topology) == pytest.approx(0.75e9 * 2 / (2 * 90e9), rel=1e-3)
    assert transfer_seconds("all-gather", 1e9, both, topology) == pytest.approx(0.875e9 / (2 * 90e9), rel=1e-3)
    # Of an exchange each core has its own.
    for group in (one_core, both):
        assert transfer_seconds("all-to-all", 1e9, group, topology) == pytest.approx(2e9 * 4 / 8 / 90e9, rel=1e-3)


# Several slices.


@pytest.fixture
def two_slices():
    topology = make_topology("2*v5p:4x4x4")
    return topology, make_mesh(topology, data=2, fsdp=4, expert=16)


def test_a_group_knows_its_slices(two_slices):
    topology, mesh = two_slices
    within = find_group([0, 16, 32, 48], mesh, topology)
    across = find_group([0, 64], mesh, topology)
    everything = find_group(range(128), mesh, topology)
    assert [group.slices for group in (within, across, everything)] == [1, 2, 2]
    assert (across.spans, across.axes, across.on_chip) == ((), ("data",), 1)
    assert len(everything.spans) == 3 and everything.on_chip == 1


def test_between_slices_the_network_is_what_counts(two_slices):
    topology, mesh = two_slices
    network = topology.chip.network_bytes_per_second
    across, everything = find_group([0, 64], mesh, topology), find_group(range(128), mesh, topology)
    # Two devices, one in each slice: half of what is gathered is away.
    assert transfer_seconds("all-gather", 1e9, across, topology) == pytest.approx(0.5e9 / network)
    assert transfer_seconds("all-reduce", 1e9, across, topology) == pytest.approx(1e9 / network)
    assert transfer_seconds("all-to-all", 1e9, across, topology) == pytest.approx(0.5e9 / network)
    assert transfer_seconds("collective-permute", 1e9, across, topology) == pytest.approx(1e9 / network)
    # All of them: each of 64 chips carries its part over the network, the rest goes within the slice.
    within = transfer_seconds("all-gather", 1e9, replace(everything, size=64, slices=1), topology)
    assert transfer_seconds("all-gather", 1e9, everything, topology) == pytest.approx(within + 0.5e9 / 64 / network)
    # Of an exchange every device has half to send away, however many there are.
    assert transfer_seconds("all-to-all", 1e9, everything, topology) > 0.5e9 / network


# Permutations.


def ring_pairs(size: int, step: int = 1) -> list[tuple[int, int]]:
    return [(place, (place + step) % size) for place in range(size)]


@pytest.mark.parametrize(
    ("name", "step", "messages", "steps"),
    [
        ("v5e:1x16", 1, 1, 1),  # a ring: the last is the first one's neighbour
        ("v5e:1x8", 1, 1, 7),  # a line: the last one's message goes back through all, where no other goes
        ("v5e:1x16", 3, 3, 3),
        ("v5e:1x16", 15, 1, 1),  # backwards
    ],
)
def test_a_permutation_takes_what_passes_its_busiest_link(name, step, messages, steps):
    topology = make_topology(name)
    size = topology.shape[1]
    group = find_permutation(ring_pairs(size, step), make_mesh(topology, x=size), topology)
    assert (group.messages, group.steps) == (messages, steps)
    assert transfer_seconds("collective-permute", 1e9, group, topology) == pytest.approx(messages * 1e9 / 45e9 + steps * HOP_SECONDS)


def test_a_permutation_between_slices_goes_over_the_network(two_slices):
    topology, mesh = two_slices
    group = find_permutation([(0, 1), (1, 64)], mesh, topology)
    assert group.slices == 2
    assert transfer_seconds("collective-permute", 1e9, group, topology) == pytest.approx(1e9 / topology.chip.network_bytes_per_second)


def test_pairs_are_read_all():
    assert find_pairs("channel_id=1, source_target_pairs={{0,128},{128,256},{2,130}}, x={{7,7}}") == [(0, 128), (128, 256), (2, 130)]
    assert find_pairs("channel_id=1") == []


# As XLA writes them.


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups={{3}}", [3]),
        ("replica_groups={}, x=1", list(range(16))),
        ("channel_id=3", list(range(16))),
        ("replica_groups=[4,4]<=[16]", [0, 1, 2, 3]),
        ("replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}", [0, 4, 8, 12]),
        ("replica_groups=[2,8]<=[2,2,4]T(1,0,2)", [0, 1, 2, 3, 8, 9, 10, 11]),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2] {'axis_0'}, dimensions={1}", [0, 2, 4, 6, 8, 10, 12, 14]),
        ("replica_groups=mesh['x'=4,'y'=4] {'y'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['x'=2,'y'=8] {'x','y'}", list(range(16))),
        ("replica_groups=mesh['x'=16] {'x':(1)2}", [0, 8]),
        ("replica_groups=mesh['x'=16] {'x':(2)4}", [0, 2, 4, 6]),
        ("replica_groups=mesh['x'=2,'y'=8] {'x','y':(4)2}", [0, 1, 8, 9]),
        ("replica_groups=mesh['x'=2,'y'=2, device_ids=(0,2,1,3)] {'y'}", [0, 2]),
        ("replica_groups=mesh['x'=2,'y'=2, device_ids=([2,2]T(1,0))] {'y'}", [0, 2]),
    ],
)
def test_groups_in_every_spelling(written, group):
    assert first_group(f"channel_id=1, {written}", 16) == group


def test_kinds_of_opcodes():
    assert kind_of("all-to-all-start") == kind_of("all-to-all") == "all-to-all"
    assert kind_of("ragged-all-to-all-start") == "ragged-all-to-all"
    assert [kind_of(opcode) for opcode in ("all-to-all-done", "copy-start", "add", "all-gatherer")] == [None] * 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bf16[32,128] all-gather(%a), dimensions={0}", 2 * 32 * 128),
        ("(bf16[32,128], f32[8]) all-gather(%a, %b), dimensions={0}", 2 * 32 * 128 + 32),
        ("((bf16[8,128], f32[2]), (bf16[32,128], f32[8])) all-gather-start(%a, %b), dimensions={0}", 2 * 32 * 128 + 32),
        ("(bf16[8,128], bf16[32,128]) all-gather-start(%a), dimensions={0}", 2 * 32 * 128),
        ("bf16[2,128] reduce-scatter(%a), dimensions={0}", 2 * 8 * 128),
        ("(bf16[8,128], f32[2]) all-reduce(%a, %b)", 2 * 8 * 128 + 8),
        ("((bf16[8,128]), bf16[8,128], u32[], u32[]) all-to-all-start(%a)", 2 * 8 * 128),
        ("bf16[8,128] collective-permute(%a)", 2 * 8 * 128),
        ("bf16[16,128] ragged-all-to-all(%a, %room, %b, %b, %b, %b)", 2 * 8 * 128),  # into a buffer with room to spare
        ("bf16[8,128] ragged-all-to-all(%room, %a, %b, %b, %b, %b)", 2 * 8 * 128),  # and out of it
    ],
)
def test_bytes_that_count(line, expected):
    text = f"""HloModule m
ENTRY %main (a: bf16[8,128], b: f32[2], room: bf16[16,128]) -> f32[] {{
  %a = bf16[8,128]{{1,0}} parameter(0)
  %b = f32[2]{{0}} parameter(1)
  %room = bf16[16,128]{{1,0}} parameter(2)
  ROOT %c = {line}
}}"""
    program = read_program(text)
    main = program.computations[program.entry]
    operands = [float(main.by_name[name].bytes) for name in main.root.operands]
    assert moved_bytes(kind_of(main.root.opcode), main.root, operands) == expected
