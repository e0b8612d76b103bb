"""The named device mesh, and the one table from logical axes of arrays to axes of the mesh.

Weights declare logical axes where they are made (moejax/model); this table alone decides what they mean on devices.
"""

import math

import jax
from jax.sharding import AxisType, Mesh

from moejax.config import MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")

# Logical axis -> mesh axes. Axes that are not named here are not sharded.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
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

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(dict(zip(MESH_AXES, (data, fsdp, expert, context, tensor, stage), strict=True)), len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def require_one_device(config: MeshConfig) -> None:
    """Raises UserError for a mesh that names more than one device: training shards nothing yet, and says so instead of ignoring it."""
    asked = {axis: size for axis in MESH_AXES if (size := getattr(config, axis)) not in (1, -1)}
    if asked:
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in asked.items())
        raise UserError(f"{named}: training on more than one device is not implemented yet; leave the mesh at one device")
