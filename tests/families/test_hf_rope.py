"""Rotary scaling as config.json has it: the numbers are transformers' own (rope_scaling.json holds what 5.23 computes), both ways."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moejax.config import ModelConfig, UserError
from moejax.families import FAMILIES, get_family
from moejax.families.config_reader import ConfigReader
from moejax.families.hf_rope import read_rope
from moejax.model.positions import model_frequencies
from moejax.rope_config import RopeScaling

CASES = json.loads(Path(__file__).with_name("rope_scaling.json").read_text())


def config_of(values) -> ModelConfig:
    return get_family("mixtral").config_from_hf({"num_key_value_heads": 4} | values, "config.json")


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case):
    config = config_of(case["config"])
    ours = model_frequencies(config, case.get("seq_len", 0))
    np.testing.assert_allclose(ours.radians, case["inv_freq"], rtol=1e-6)
    assert ours.attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)
    plain = model_frequencies(dataclasses.replace(config, rope_scaling=RopeScaling()), 0).radians
    assert np.allclose(ours.radians, plain, rtol=1e-4) == (case.get("seq_len") == 1000), "scaling changes something"


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_the_transformers_installed(case):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="the torch extra is not installed")
    from transformers import MixtralConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = MixtralConfig(**copy.deepcopy(case["config"]))
    frequencies, factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, seq_len=case.get("seq_len"))
    ours = model_frequencies(config_of(case["config"]), case.get("seq_len", 0))
    np.testing.assert_allclose(ours.radians, frequencies.numpy(), rtol=1e-6)
    assert ours.attention_factor == pytest.approx(float(factor), rel=1e-12)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_reads_back_the_same(family, case):
    values = case["config"] | {"num_key_value_heads": 4}
    config = FAMILIES[family].config_from_hf(values, "config.json")
    written = json.loads(json.dumps(FAMILIES[family].config_to_hf(config)))
    assert FAMILIES[family].config_from_hf(written, "config.json") == config
    assert config.rope_scaling.kind != "none"


def read(values) -> dict:
    return read_rope(ConfigReader(values, "x.json"))


def test_both_spellings_are_the_same():
    scaling = {"factor": 4, "beta_fast": None, "original_max_position_embeddings": 128, "unknown_note": True}
    old = {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", **scaling}}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **scaling}}
    assert read(old) == read(new) == {"rope_theta": 5e4, "rope_scaling": RopeScaling("yarn", 4.0, 128)}
    assert read({}) == {"rope_theta": 1e6, "rope_scaling": RopeScaling()}
    # As written by transformers 5 from a config that had both.
    assert read(old | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})["rope_theta"] == 7.0


def test_yarn_without_a_factor_goes_by_the_lengths():
    values = {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 128}}
    assert read(values)["rope_scaling"] == RopeScaling("yarn", 4.0, 128)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope"}, "x.json: rope_scaling.rope_type is 'longrope'; expected one of default, linear, dynamic, yarn, llama3"),
        ({"rope_type": None}, "rope_scaling.rope_type is None; expected one of"),
        ({"rope_type": "linear"}, "x.json: rope_scaling: factor is None; expected a number from 1 on"),
        ({"type": "dynamic", "factor": 0.5}, "factor is 0.5; expected a number from 1 on"),
        ({"rope_type": "yarn", "factor": "2"}, "factor is '2'; expected a number"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor is None; expected a number, which rope_type 'llama3' needs"),
        ([4.0], "rope_scaling is [4.0]; expected an object"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(scaling, message):
    with pytest.raises(UserError) as error:
        read({"rope_scaling": scaling})
    assert message in str(error.value)


def test_a_dynamic_length_that_config_json_cannot_say_is_not_exported():
    config = dataclasses.replace(config_of({"max_position_embeddings": 64}), rope_scaling=RopeScaling("dynamic", 2.0, 32))
    with pytest.raises(UserError, match=r"model\.rope_scaling=.* cannot be written"):
        get_family("mixtral").config_to_hf(config)
