"""Peaks come from the table by whole words of the device's name, or from a matmul; memory from whoever counts it."""

import os
from types import SimpleNamespace

import jax
import pytest
from jax import numpy as jnp

from moejax.training import hardware


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU7x", "bfloat16", 1153.5),
        ("TPU v4", "float32", None),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA H100 80GB HBM3", "float32", 67),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float16", 989),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", None),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_listed_peaks(kind, dtype, teraflops):
    peak = hardware.listed_peak(kind, dtype)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_listed_peaks_add_up_over_devices():
    devices = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")] * 8
    assert hardware.find_peak(devices, "bfloat16") == hardware.Peak(8 * 989e12, "listed")


def test_devices_of_the_cpu_share_what_was_measured():
    one, four = (hardware.find_peak(jax.devices("cpu")[:count], "float32") for count in (1, 4))
    assert one == four
    assert one.source == "measured"
    assert 1e9 < one.flops_per_second < 1e14


def test_the_devices_a_step_ran_on():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[2:6], axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(jnp.zeros(8), jax.NamedSharding(mesh, jax.P("data")))
    assert hardware.devices_of({"a": 1.0, "loss": spread}) == jax.devices()[2:6]
    assert hardware.devices_of({"a": 1.0}) == jax.devices()[:1]


def test_memory_is_that_of_the_fullest_device_where_devices_count():
    def device(stats, process=0):
        return SimpleNamespace(memory_stats=lambda: stats, process_index=process)

    counting = [device({"peak_bytes_in_use": 5}), device({"peak_bytes_in_use": 9}), device({"peak_bytes_in_use": 99}, process=7)]
    assert hardware.peak_memory_bytes(counting) == (9, "device")
    peak, source = hardware.peak_memory_bytes([device(None), device({"bytes_in_use": 3})])
    assert source == "process"
    assert peak > 50e6  # jax alone is more than that


def test_the_resident_peak_rises_with_what_is_taken():
    before = hardware.peak_resident_bytes()
    taken = bytearray(before + 50_000_000)  # a page that is not written to is not resident
    taken[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(taken[:: os.sysconf("SC_PAGE_SIZE")])
    assert hardware.peak_resident_bytes() > before
