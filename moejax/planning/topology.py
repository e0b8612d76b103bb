"""Devices to compile for, most of which are not here: what `v5p:8x8x16`, `2*v5p:8x8x8` and `local` name."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moejax.config import UserError
from moejax.planning.chips import CHIPS, Chip
from moejax.planning.messages import captured_stderr

EXAMPLES = "v5p:8x8x16, v5e:16x16, v6e:16x16, tpu7x:4x4x8, 2*v5p:8x8x8 (two slices) or local"
_NAME = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<kind>[a-z0-9]+):(?P<shape>\d+(?:x\d+){1,2})")


@dataclass(frozen=True)
class Topology:
    """Devices, in no order, and the chip they are; `chip` is None for `local` devices of another kind, `shape` one slice's chips."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    shape: tuple[int, ...] = ()
    slices: int = 1

    def is_ring(self, dimension: int) -> bool:
        """Whether the first and the last chip along a dimension are neighbours.

        In three dimensions optical switches close rings, and only between whole cubes: 2x2x4 has none.
        """
        assert self.chip is not None
        whole = [size % self.chip.wraps_from == 0 for size in self.shape]
        return all(whole) if len(self.shape) == 3 else whole[dimension]


def check_name(name: str) -> None:
    """Raises UserError for a name of no topology, before anything is loaded."""
    found = _NAME.fullmatch(name)
    if name != "local" and (found is None or found["kind"] not in CHIPS or 0 in _sizes(found)):
        raise UserError(f"--plan {name}: no such topology; expected CHIP:SHAPE with a chip of {', '.join(CHIPS)}, as {EXAMPLES}")


def open_topology(name: str) -> Topology:
    """The devices of that name. Raises UserError for a name that `check_name` refuses or libtpu does not know, and without libtpu."""
    check_name(name)
    if name == "local":
        import jax

        return _local_topology(jax.devices())
    found = _NAME.fullmatch(name)
    assert found is not None
    slices, *shape = _sizes(found)
    devices = tpu_devices(f"{found['kind']}:{found['shape']}", slices)
    return Topology(name, tuple(devices), CHIPS[found["kind"]], tuple(shape), slices)


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """libtpu's devices of a topology as v5p:2x2x2, none of which need be here.

    Raises UserError without libtpu, and for a topology that it does not know.
    """
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError('this needs libtpu, the compiler for TPUs, which is not installed; pip install "moejax[tpu]"') from error
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud is asked what this machine is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling holds no device
    os.environ["TPU_STDERR_LOG_LEVEL"] = "1"  # warnings: the partitioner's are looked for
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device a chip, as jax counts them on v4; two without this
    try:
        with captured_stderr():  # what libtpu says about a machine without a TPU
            return list(topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"libtpu has no topology {topology!r} ({reason}); use one as v5p:2x2x2 or v6e:2x4") from error


def _sizes(found: re.Match[str]) -> list[int]:
    """Slices, and the chips along each dimension of one."""
    return [int(found["slices"] or 1), *(int(size) for size in found["shape"].split("x"))]


def _local_topology(devices: Sequence[Any]) -> Topology:
    """The devices that are here. Of TPUs the shape is read from their coordinates, so that their links are known."""
    chip = _chip_of(devices[0].device_kind)
    if chip is None:
        return Topology("local", tuple(devices), None)
    shape = tuple(1 + max(places) for places in zip(*(device.coords for device in devices), strict=True))
    shape = shape[:2] if chip.links == 4 else shape  # libtpu gives three coordinates where the torus has two dimensions
    return Topology("local", tuple(devices), chip, shape, len({getattr(device, "slice_index", 0) for device in devices}))


def _chip_of(kind: str) -> Chip | None:
    """The chip that jax calls so: TPU v5 lite, TPU v5p, TPU v6 lite, TPU7x."""
    names = {"v4": "v4", "v5lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6lite": "v6e", "v6e": "v6e", "7x": "tpu7x"}
    return CHIPS.get(names.get(kind.lower().removeprefix("tpu").replace(" ", ""), ""))
