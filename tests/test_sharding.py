"""The device mesh: sizes that fit the devices, and one message where they do not."""

import math

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

import moejax
from moejax.config import MeshConfig, ModelConfig, UserError
from moejax.sharding import MESH_AXES, RULES, mesh_of, partition_spec, resolve_sizes


def sizes(**given):
    return {axis: given.get(axis, 1) for axis in MESH_AXES}


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        ({"fsdp": -1}, 8, {"fsdp": 8}),
        ({"fsdp": -1, "expert": 4}, 8, {"fsdp": 2, "expert": 4}),
        ({"expert": 2, "tensor": 4}, 8, {"expert": 2, "tensor": 4}),
        ({"fsdp": -1}, 1, {}),
    ],
)
def test_the_open_axis_takes_the_devices_that_are_left(given, devices, expected):
    resolved = resolve_sizes(sizes(**given), devices)
    assert resolved == sizes(**expected)
    assert math.prod(resolved.values()) == devices


@pytest.mark.parametrize(
    ("given", "devices", "parts"),
    [
        ({"expert": 3, "fsdp": -1}, 8, ("expert=3", "3 devices", "there are 8")),
        ({"expert": 2, "tensor": 2}, 8, ("expert=2, tensor=2", "4 devices", "there are 8", "-1")),
        ({}, 8, ("one device", "there are 8")),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, devices, parts):
    with pytest.raises(UserError) as caught:
        resolve_sizes(sizes(**given), devices)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_a_mesh_has_every_axis_by_name():
    mesh = moejax.make_mesh(expert=2, fsdp=-1, devices=jax.devices()[:4])
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == sizes(expert=2, fsdp=2)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert moejax.make_mesh().size == jax.device_count()


class Chip:
    """As much of a device as laying out a mesh looks at."""

    platform, device_kind, process_index = "made up", "made up", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index = number, slice_index

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_only_data_runs_across_slices():
    chips = [Chip(number, number % 2) for number in range(8)]
    mesh = moejax.make_mesh(data=4, fsdp=2, devices=chips)
    for position, row in enumerate(mesh.devices.reshape(4, 2)):
        assert {chip.slice_index for chip in row} == {position // 2}
    with pytest.raises(UserError, match=r"mesh\.data=1 is no multiple of the 2 slices.*--mesh.data 2"):
        moejax.make_mesh(fsdp=8, devices=chips)


class TorusChip(Chip):
    """A chip of a v5p pod, at its place in the torus."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5p", 0

    def __init__(self, number: int, slice_index: int = 0):
        super().__init__(number, slice_index)
        self.coords = [number % 4, number // 4 % 4, number // 16]


def test_axes_that_no_dimensions_of_a_torus_fit_divide_one():
    """8 x 8 of 4 x 4 x 4: what jax.make_mesh refuses."""
    mesh = moejax.make_mesh(expert=8, tensor=8, devices=[TorusChip(number) for number in range(64)])
    assert (mesh.shape["expert"], mesh.shape["tensor"]) == (8, 8)
    assert len({chip.id for chip in mesh.devices.flat}) == 64
    slices = moejax.make_mesh(data=2, expert=8, tensor=8, devices=[TorusChip(number, part) for part in range(2) for number in range(64)])
    assert [{chip.slice_index for chip in half.flat} for half in slices.devices] == [{0}, {1}]
    assert len({(chip.slice_index, chip.id) for chip in slices.devices.flat}) == 128


def test_the_rules_name_axes_of_the_mesh():
    assert {axis for axes in RULES.values() for axis in axes} <= set(MESH_AXES)


def test_the_configuration_has_the_axes_of_the_mesh():
    assert tuple(MeshConfig.__dataclass_fields__) == MESH_AXES


def test_one_device_is_no_mesh(monkeypatch):
    assert mesh_of(MeshConfig()).shape["fsdp"] == 8
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    assert mesh_of(MeshConfig()) is None


IMPOSSIBLE = {
    "experts that do not divide": ({"expert": 4, "fsdp": 2}, {"num_experts": 6}, ("mesh.expert=4", "model.num_experts=6", "1, 2, 3, 6")),
    "heads that do not divide": ({"tensor": 8}, {"num_heads": 4}, ("mesh.tensor=8", "model.num_kv_heads=2", "1, 2")),
    "stages": ({"stage": 8}, {}, ("mesh.stage=8", "reserved")),
    "rows that stay at home": ({"expert": 8}, {"dispatch": "sorted"}, ("model.dispatch='sorted'", "mesh.expert=8", "gather")),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_mesh_that_does_not_fit_the_model_says_what_would(case):
    axes, model, parts = IMPOSSIBLE[case]
    with pytest.raises(UserError) as caught:
        mesh_of(MeshConfig(**{"fsdp": 1} | axes), ModelConfig(**model))
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_what_does_not_divide_is_not_divided():
    mesh = moejax.make_mesh(fsdp=4, tensor=2)
    assert partition_spec(("mlp", "embed"), (6, 8), mesh) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(("mlp", "embed"), (5, 6), mesh) == PartitionSpec(None, None)
    assert partition_spec((None, "batch"), (3, 8), mesh) == PartitionSpec(None, "fsdp")
