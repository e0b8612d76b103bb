"""PEFT's configuration: the factor of each module, and everything that is more than plain LoRA refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moejax.checkpoint.peft_config import read_peft_scaling
from moejax.config import UserError

FILE = Path("adapter_model.safetensors")


@pytest.fixture
def configured(tmp_path):
    """A function: the path of an adapter_config.json with these values."""

    def write(**values):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | values))
        return path

    return write


@pytest.mark.parametrize(
    ("values", "module", "rank", "factor"),
    [
        ({}, "model.layers.0.self_attn.q_proj", 4, 2.0),
        ({"use_rslora": True}, "model.layers.0.self_attn.q_proj", 4, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, "model.layers.0.self_attn.q_proj", 2, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, "model.layers.0.self_attn.k_proj", 4, 2.0),
        ({"rank_pattern": {"proj": 2}}, "model.layers.0.self_attn.k_proj", 4, 2.0),  # a whole part of the name, or a pattern
        ({"alpha_pattern": {r"layers\.[01]\..*proj": 1}}, "model.layers.1.self_attn.k_proj", 4, 0.25),
        (
            {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}},
            "model.layers.0.mlp.experts.gate_up_proj",
            8,
            2.0,
        ),
    ],
)
def test_factors(configured, values, module, rank, factor):
    assert read_peft_scaling(configured(**values), None).of(FILE, module, rank) == factor
    assert read_peft_scaling(configured(**values), 0.5).of(FILE, module, rank) == 0.5


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_rank_that_is_not_the_configurations_is_named(configured, scale):
    with pytest.raises(UserError, match=r"adapter_model.safetensors: w1 has rank 3, adapter_config.json says 4"):
        read_peft_scaling(configured(), scale).of(FILE, "w1", 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "DoRA cannot be merged here"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules that were trained whole"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "weights stored transposed"),
        ({"r": 0}, "r is 0; expected the rank"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(configured, values, message):
    with pytest.raises(UserError, match=message) as error:
        read_peft_scaling(configured(**values), None)
    assert "adapter_config.json" in str(error.value)
