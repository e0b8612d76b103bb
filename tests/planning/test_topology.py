"""Names of topologies, what they open, and what is said of those that cannot be."""

import sys

import jax
import pytest

from moejax.config import UserError
from moejax.planning.chips import CHIPS
from moejax.planning.topology import _chip_of, _local_topology, check_name, open_topology
from tests.planning.slices import make_topology


@pytest.mark.parametrize("name", ["v5p:8x8x16", "v5e:16x16", "v6e:2x4", "tpu7x:4x4x8", "v4:2x2x1", "2*v5p:8x8x8", "local"])
def test_good_names_pass(name):
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "v5p",
        "v5p:8",
        "v5p:8x8x16x2",
        "v7:2x2",
        "V5P:2x2x1",
        "v5p:0x2x2",
        "0*v5p:2x2x1",
        "2*local",
        "v5p:2x2x1 ",
        "-1*v5p:2x2x1",
        "v5p:2xx2",
    ],
)
def test_bad_names_are_refused_in_one_line_before_anything_is_loaded(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="no such topology") as error:
        open_topology(name)
    assert "\n" not in str(error.value) and f"--plan {name}:" in str(error.value) and "v5p:8x8x16" in str(error.value)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # import raises ImportError
    with pytest.raises(UserError, match=r"moejax\[tpu\]") as error:
        open_topology("v5p:2x2x1")
    assert "\n" not in str(error.value)


def test_local_is_what_jax_has():
    local = open_topology("local")
    assert (list(local.devices), local.chip, local.shape, local.slices) == (jax.devices(), None, (), 1)


@pytest.mark.parametrize(("name", "kind"), [("v5e:4x4", "TPU v5 lite"), ("v5p:2x2x4", "TPU v5p"), ("2*v6e:2x4", "TPU v6 lite")])
def test_local_tpus_know_their_torus_from_their_coordinates(name, kind):
    expected = make_topology(name)
    devices = [_Renamed(device, kind) for device in expected.devices]
    local = _local_topology(devices)
    assert (local.chip, local.shape, local.slices) == (expected.chip, expected.shape, expected.slices)


class _Renamed:
    def __init__(self, device, kind):
        self.coords, self.slice_index, self.device_kind = device.coords, device.slice_index, kind


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)
def test_jax_names_of_chips(kind, chip):
    assert _chip_of(kind) is CHIPS[chip]


def test_other_devices_are_no_chip_of_the_table():
    assert _chip_of("cpu") is None
    assert _chip_of("NVIDIA H100 80GB HBM3") is None


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:8x8x16", (True, True, True)),
        ("v4:4x4x4", (True, True, True)),
        ("v5p:2x2x4", (False, False, False)),  # no whole cube, no optical switches
        ("v5p:2x4x4", (False, False, False)),
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
        ("tpu7x:4x4x8", (True, True, True)),
    ],
)
def test_which_dimensions_are_rings(name, rings):
    """As "How to Scale Your Model", chapter "TPUs", has it."""
    topology = make_topology(name)
    assert tuple(topology.is_ring(dimension) for dimension in range(len(topology.shape))) == rings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x2", "v5e:2x4", "tpu7x:2x2x1", "2*v5e:2x2"])
def test_libtpu_gives_the_devices_that_the_tests_imagine(name):
    pytest.importorskip("libtpu")
    found, imagined = open_topology(name), make_topology(name)
    assert (found.chip, found.shape, found.slices) == (imagined.chip, imagined.shape, imagined.slices)
    where = lambda device: (getattr(device, "slice_index", 0) or 0, tuple(device.coords), device.core_on_chip)  # noqa: E731
    assert sorted(map(where, found.devices)) == sorted(map(where, imagined.devices))


@pytest.mark.slow
def test_a_shape_that_libtpu_does_not_know_is_refused_in_one_line():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match="v5p:3x3x3") as error:
        open_topology("v5p:3x3x3")
    assert "\n" not in str(error.value)
