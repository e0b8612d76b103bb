"""The named device mesh, and the one table from logical axes of arrays to axes of the mesh.

Weights declare logical axes where they are made (moejax/model); this table alone decides what they mean on devices.
"""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config import MeshConfig, ModelConfig, UserError, divisors

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")

# Logical axis -> mesh axes. Axes that are not named here are not sharded.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "time": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "vocab": ("tensor",),
}


def resolve_sizes(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    """Replaces the one -1 by the devices that are left. Raises UserError where the product cannot be `num_devices`."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % fixed or (-1 not in sizes.values() and fixed != num_devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise UserError(
            f"mesh {asked or 'of one device'} takes {fixed} devices, but there are {num_devices}; change an axis, or set one to -1"
        )
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(
    data: int = 1, fsdp: int = -1, expert: int = 1, context: int = 1, tensor: int = 1, stage: int = 1, *, devices: list | None = None
) -> Mesh:
    """A mesh with all axes by name; -1 takes the devices that are left. Axes are `Auto`: jit partitions, shard_map where written.

    The later an axis, the nearer its devices: `tensor` gets the fastest links. Where devices form several slices, which only a
    slower network joins, `data` runs across them. Raises UserError when the sizes do not multiply to the number of devices, or `data`
    is no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(dict(zip(MESH_AXES, (data, fsdp, expert, context, tensor, stage), strict=True)), len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Where no dimensions of a torus have an axis's size between them, as 8 of 4 x 4 x 4, one is divided among two axes.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data={sizes['data']} is no multiple of the {slices} slices that the devices form; only data runs across slices, "
            f"set --mesh.data {slices} or a multiple of it"
        )
    within = (sizes["data"] // slices, *shape[1:])
    across = (slices, *(1,) * (len(shape) - 1))
    placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


def mesh_of(config: MeshConfig, model: ModelConfig | None = None) -> Mesh | None:
    """The mesh of a configuration over all devices; None where that is one device. Raises UserError for one that the model does not fit."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    mesh = make_mesh(**sizes)
    if model is not None:
        check_mesh(model, mesh)
    return mesh if mesh.size > 1 else None


def axis_size(mesh: Mesh | None, *axes: str) -> int:
    """Devices along these axes together; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh. A dimension that its mesh axes do not divide is not divided."""
    parts = []
    for name, size in zip(axes, shape, strict=True):
        over = tuple(axis for axis in RULES.get(name or "", ()) if mesh.shape[axis] > 1)
        if not over or size % axis_size(mesh, *over):
            parts.append(None)
        else:
            parts.append(over if len(over) > 1 else next(iter(over)))
    return PartitionSpec(*parts)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """x, laid out on the mesh by its logical axes; as it is without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh)))


def check_mesh(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError, naming axis and sizes, for a mesh that cannot hold the model."""
    for axis, name in (("expert", "num_experts"), ("tensor", "num_kv_heads"), ("tensor", "num_heads")):
        size, count = mesh.shape[axis], getattr(model, name)
        if count % size:
            fitting = ", ".join(map(str, divisors(count)))
            raise UserError(f"mesh.{axis}={size} does not divide model.{name}={count}; use one of {fitting} for mesh.{axis}")
    if mesh.shape["stage"] > 1:
        raise UserError(f"mesh.stage={mesh.shape['stage']}: pipeline stages are reserved for later; use 1")
    if model.dispatch in ("sorted", "dense") and mesh.shape["expert"] > 1:
        raise UserError(
            f"model.dispatch={model.dispatch!r} keeps rows on their device, but mesh.expert={mesh.shape['expert']} has the experts on "
            "several; use auto, ragged, gather or capacity"
        )
