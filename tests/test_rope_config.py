"""RopeScaling: what each kind needs, what it does not read, flags, and the way through JSON."""

import dataclasses
import json

import pytest

from moejax.cli import parse_run
from moejax.config import ModelConfig, UserError, model_from_json, to_json
from moejax.rope_config import RopeScaling, attention_factor_of


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ntk"}, "model.rope_scaling.kind='ntk' is unknown; expected one of none, linear, dynamic, yarn, llama3"),
        ({"kind": "yarn"}, "model.rope_scaling.factor=None must be a number from 1 on"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5 must be a number from 1 on"),
        (
            {"factor": 2.0},
            "says nothing to model.rope_scaling.kind='none'; leave it out, or set --model.rope-scaling.kind to one of linear",
        ),
        ({"kind": "linear", "factor": 2.0, "original_length": 8}, "original_length=8 says nothing to model.rope_scaling.kind='linear'"),
        ({"kind": "yarn", "factor": 2.0, "beta_fast": 0.5}, "beta_fast=0.5 must not be below"),
        ({"kind": "llama3", "factor": 2.0, "high_frequency_factor": 1.0}, "must be above model.rope_scaling.low_frequency_factor=1.0"),
        ({"kind": "yarn", "factor": 2.0, "original_length": 0}, "original_length=0 must be greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(UserError) as error:
        RopeScaling(**values)
    assert message in str(error.value)


def test_attention_factor_of_yarn():
    assert attention_factor_of(1.0) == 1.0
    assert attention_factor_of(8.0) == pytest.approx(1.2079441541679836)
    assert attention_factor_of(8.0, 1.0, 1.0) == 1.0


def test_it_goes_through_json_and_old_files_have_none():
    config = ModelConfig(rope_scaling=RopeScaling("yarn", 8.0, 512, truncate=False))
    written = json.loads(json.dumps(to_json(config)))
    assert model_from_json(written) == config
    del written["rope_scaling"]
    assert model_from_json(written) == dataclasses.replace(config, rope_scaling=RopeScaling())
    with pytest.raises(UserError, match=r"x: model\.rope_scaling\.kind='ntk' is unknown"):
        model_from_json({"rope_scaling": {"kind": "ntk"}}, "x")


def test_flags_reach_it(tmp_path):
    path = tmp_path / "run.py"
    path.write_text('"""A run."""\nfrom moejax.config import RunConfig\n\n\ndef config():\n    return RunConfig()\n')
    flags = ["--model.rope-scaling.kind", "yarn", "--model.rope-scaling.factor", "8", "--model.rope-scaling.original-length", "512"]
    config = parse_run([str(path), *flags], path).config
    assert config.model.rope_scaling == RopeScaling("yarn", 8.0, 512)
