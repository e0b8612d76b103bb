"""Searching for plans: candidates that could be, the frontier of time and memory, the nearest that fits. Nothing is compiled here."""

import dataclasses

import jax
import pytest

from moejax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from moejax.planning.chips import CHIPS
from moejax.planning.topology import Topology
from moejax.training import plan_search
from moejax.training.plan import plan_mesh, state_bytes
from moejax.training.plan_search import candidates, estimate_bytes, find_fitting, mark_frontier, search

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_experts=4, max_length=64, remat="full"),
    mesh=MeshConfig(expert=4, fsdp=2),
    data=DataConfig(sequence_length=32),
    train=TrainConfig(steps=3, batch_size=8),
)
SLICE = Topology("eight", tuple(jax.devices()), CHIPS["v5p"], (2, 2, 2))


def fake_plan(fits=lambda config: True):
    """`plan_run` without a compiler: seconds and bytes that follow from the configuration."""

    def plan(config, topology, compare_sequential=True):
        mesh = plan_mesh(config, topology)
        ok = fits(config)
        return {
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1}, "remat": config.model.remat, "fits": ok,
            "accumulation_steps": config.train.accumulation_steps,
            "predicted_step_seconds": mesh.shape["tensor"] + {"none": 0.1, "dots": 0.2, "full": 0.3}[config.model.remat] if ok else None,
            "bytes_per_device": {"total": estimate_bytes(config, topology)},
        }  # fmt: skip

    return plan


def test_candidates_are_meshes_that_the_model_and_the_devices_allow():
    found = candidates(CONFIG, SLICE)
    meshes = {tuple(plan_mesh(one.config, SLICE).shape.items()) for one in found}
    assert len(found) == 3 * len(meshes) > 9  # each with all three policies
    assert all(dict(mesh)["expert"] in (1, 2, 4) and dict(mesh)["tensor"] in (1, 2) for mesh in meshes)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)


def test_the_rough_count_holds_at_least_the_state_and_keeps_more_without_rematerialisation():
    kept = {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat=remat))
        kept[remat] = estimate_bytes(config, SLICE)
    assert kept["none"] > kept["dots"] > kept["full"] > sum(state_bytes(CONFIG, plan_mesh(CONFIG, SLICE)).values())


def test_a_search_ends_in_time_and_begins_with_the_run_s_own(monkeypatch):
    monkeypatch.setattr(plan_search, "plan_run", fake_plan())
    told = []
    rows, untried = search(CONFIG, SLICE, 60.0, told.append)
    assert untried == 0 and told[0].startswith("1: {'fsdp': 2, 'expert': 4}, remat full")
    assert [row["predicted_step_seconds"] for row in rows] == sorted(row["predicted_step_seconds"] for row in rows)
    alike = [(tuple(row["mesh"].items()), row["remat"]) for row in rows]
    assert len(alike) == len(set(alike))
    clock = iter([0.0, 1.0, *[100.0] * 9])
    monkeypatch.setattr(plan_search.time, "perf_counter", lambda: next(clock))
    rows, untried = search(CONFIG, SLICE, 60.0)
    assert len(rows) == 1 and untried > 5


def test_the_frontier():
    def row(seconds, size, fits=True):
        return {"predicted_step_seconds": seconds, "bytes_per_device": {"total": size}, "fits": fits}

    rows = [row(1.0, 50), row(2.0, 20), row(2.0, 60), row(3.0, 20), row(0.5, 99), row(None, 10, False)]
    mark_frontier(rows)
    assert [one["on_frontier"] for one in rows] == [True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        (lambda config: config.train.accumulation_steps > 1, {"accumulation_steps": 2}),
        (lambda config: config.mesh.expert == 2, {"remat": "full"}),
        (lambda config: False, None),
    ],
)
def test_the_nearest_that_fits(monkeypatch, fits, expected):
    monkeypatch.setattr(plan_search, "plan_run", fake_plan(fits))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=16))
    found = find_fitting(config, SLICE, 60.0)
    if expected is None:
        assert found is None
    else:
        assert found is not None and found["fits"]
        assert {name: found[name] for name in expected} == expected
