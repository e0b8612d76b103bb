"""A plan for people: what fits and what does not, times where they are known, the frontier of a search."""

import copy

from moejax.training.plan_report import tell_plan, tell_search

PLAN = {
    "name": "x", "topology": "v5p:2x2x2", "devices": 8, "mesh": {"expert": 8}, "dispatch": "capacity", "remat": "full", "batch_size": 8,
    "sequence_length": 4096, "accumulation_steps": 1, "fits": True, "hbm_bytes": 95 * 2**30, "compile_seconds": 12.0,
    "bytes_per_device": {
        "parameters": 2**30, "optimizer": 2**31, "activations": 2**30, "temporaries": 2**30, "program": 0, "total": 5 * 2**30,
    },
    "flops": {"model": 1e15, "program": 4e15 / 3, "compiler": 1e13},
    "compute_seconds": 0.8, "flops_seconds": 0.6, "hbm_seconds": 0.1, "link_seconds": 0.5, "waiting_seconds": 0.2,
    "predicted_step_seconds": 1.0, "roofline_step_seconds": 0.9, "predicted_tokens_per_second": 32768.0, "predicted_mfu": 0.27,
    "hidden_all_to_all_forward": 0.9, "hidden_all_to_all_backward": 0.5, "sequential_hidden_all_to_all_forward": None,
    "collectives": [
        {"kind": "all-to-all", "axes": ["expert"], "direction": "forward", "asynchronous": True, "runs": 70, "bytes": 8e9, "seconds": 0.2,
         "hidden_seconds": 0.18},
    ],
    "assumptions": ["links are free"],
}  # fmt: skip


def test_a_plan_that_fits():
    text = "\n".join(tell_plan(PLAN))
    assert "fits, 90.0 GiB left of 95.0" in text
    assert "1.000, 32,768 tokens/s, MFU 27.0%; 0.900 were" in text
    assert "forward 90.0%, backward 50.0%, sequential wiring forward no all-to-all" in text
    assert "all-to-all          expert          forward        70     8.00    200.0      180.0  yes" in text
    assert "  - links are free" in text


def test_a_plan_that_does_not_fit_says_by_how_much_and_no_times():
    plan = copy.deepcopy(PLAN) | {"fits": False, "predicted_step_seconds": None}
    plan["bytes_per_device"]["total"] = 100 * 2**30
    text = "\n".join(tell_plan(plan))
    assert "DOES NOT FIT, 5.0 GiB too much of 95.0" in text
    assert "seconds of a step" not in text and "activations" not in text


def test_a_search():
    slow = copy.deepcopy(PLAN) | {"predicted_step_seconds": None, "predicted_mfu": None, "fits": False, "on_frontier": False}
    lines = tell_search([PLAN | {"on_frontier": True}, slow], 60.0, 3)
    assert "2 plans within 60 s, 3 not tried" in lines[0]
    assert lines[2].startswith("* expert 8") and "1.000" in lines[2] and "90%" in lines[2]
    assert lines[3].startswith("  expert 8") and lines[3].endswith("does not fit")
