"""The device mesh: sizes that fit the devices, and one message where they do not."""

import math

import jax
import pytest
from jax.sharding import AxisType

import moejax
from moejax.config import MeshConfig, UserError
from moejax.sharding import MESH_AXES, RULES, require_one_device, resolve_sizes


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


def test_the_rules_name_axes_of_the_mesh():
    assert {axis for axes in RULES.values() for axis in axes} <= set(MESH_AXES)


def test_the_configuration_has_the_axes_of_the_mesh():
    assert tuple(MeshConfig.__dataclass_fields__) == MESH_AXES


def test_training_says_what_it_cannot_do_yet():
    require_one_device(MeshConfig())
    require_one_device(MeshConfig(fsdp=1, data=-1))
    with pytest.raises(UserError, match=r"mesh\.expert=4.*not implemented yet.*one device"):
        require_one_device(MeshConfig(expert=4))
