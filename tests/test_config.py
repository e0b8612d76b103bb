"""moejax/config.py: what is refused and how it is said, and that a configuration survives its JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moejax.config import (
    DataConfig,
    DistributedConfig,
    Domain,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    Stage,
    TrainConfig,
    UserError,
    divisors,
    model_from_json,
    run_from_json,
    to_json,
)

# (what builds it, and what the message must hold: the field with the value it got, what was expected)
REFUSED = {
    "heads that do not divide the width": (
        lambda: ModelConfig(hidden_size=128, num_heads=7),
        ("model.num_heads=7", "model.hidden_size=128", "1, 2, 4, 8, 16, 32, 64, 128"),
    ),
    "key heads that do not divide the heads": (
        lambda: ModelConfig(num_heads=6, num_kv_heads=4, head_size=8),
        ("num_kv_heads=4", "1, 2, 3, 6"),
    ),
    "an odd head width": (lambda: ModelConfig(head_size=7), ("head_size=7", "even")),
    "more active experts than experts": (lambda: ModelConfig(num_experts=4, experts_per_token=5), ("experts_per_token=5", "1 to 4")),
    "no layers": (lambda: ModelConfig(num_layers=0), ("model.num_layers=0", "greater than 0", "--model.num-layers")),
    "an empty window": (lambda: ModelConfig(attention_window=0), ("model.attention_window=0", "greater than 0")),
    "an unknown dispatch": (lambda: ModelConfig(dispatch="srted"), ("'srted'", "sorted, dense", "did you mean 'sorted'")),  # type: ignore
    "an unknown dtype": (lambda: ModelConfig(dtype="float8"), ("model.dtype='float8'", "float32, bfloat16, float16")),  # type: ignore
    "a mesh axis of no devices": (lambda: MeshConfig(expert=0), ("mesh.expert=0", "-1")),
    "two open mesh axes": (lambda: MeshConfig(data=-1, fsdp=-1), ("data", "fsdp", "only one")),
    "a domain of no weight": (lambda: Stage(10, {"code": 0.0}), ("'code'", "0.0", "above 0")),
    "a stage of no domain": (lambda: Stage(10, {}), ("{}", "one at least")),
    "a stage of no tokens": (lambda: Stage(0, {"code": 1}), ("tokens=0", "greater than 0")),
    "a weight that is no number": (lambda: Stage(1, {"code": "much"}), ("'much'", "a dict from a text to a finite number")),
    "a stage with an unknown domain": (
        lambda: DataConfig(domains=(Domain("code", "x"),), stages=(Stage(1, {"cod": 1}),)),
        ("data.stages.0", "'cod'", "did you mean 'code'?"),
    ),
    "an open stage before another": (
        lambda: DataConfig(domains=(Domain("a", "x"),), stages=(Stage(None, {"a": 1}), Stage(1, {"a": 1}))),
        ("data.stages.0.tokens", "only the last"),
    ),
    "an unknown builtin text": (lambda: Domain("code", "builtin:cod"), ("'builtin:cod'", "prose, code, sql", "did you mean 'code'?")),
    "a domain's name that is no file's": (lambda: Domain("a/b", "x"), ("'a/b'", "letters")),
    "an unknown format": (lambda: Domain("a", "x", "json"), ("'json'", "jsonl")),
    "parts of a batch that are not whole": (
        lambda: TrainConfig(batch_size=8, accumulation_steps=3),
        ("train.accumulation_steps=3", "train.batch_size=8", "1, 2, 4, 8"),
    ),
    "a profile of no range": (lambda: TrainConfig(profile_steps="13:10"), ("train.profile_steps='13:10'", "FIRST:LAST")),
    "rows of no tokens": (lambda: DataConfig(sequence_length=0), ("data.sequence_length=0", "greater than 0")),
    "everything held out": (lambda: DataConfig(held_out_fraction=1.0), ("data.held_out_fraction=1.0", "between 0 and 1")),
    "nothing to read": (lambda: DataConfig(domains=()), ("data.domains", "data.path")),
    "two domains of one name": (lambda: DataConfig(domains=(Domain("a", "x"), Domain("a", "y"))), ("['a', 'a']", "differ")),
    "a negative learning rate": (lambda: TrainConfig(learning_rate=-1.0), ("train.learning_rate=-1.0", "greater than 0")),
    "an unknown optimiser": (
        lambda: TrainConfig(optimizer="adam"),
        ("train.optimizer='adam'", "adamw, adafactor, lion, muon", "did you mean"),
    ),  # type: ignore
    "a negative warm-up": (lambda: TrainConfig(warmup_steps=-1), ("train.warmup_steps=-1", "not be negative")),
    "a negative temperature": (lambda: SampleConfig(temperature=-0.5), ("sample.temperature=-0.5", "from 0 (greedy) on")),
    "an empty nucleus": (lambda: SampleConfig(top_p=0.0), ("sample.top_p=0.0", "above 0")),
    "one of several processes half said": (
        lambda: DistributedConfig(process_id=1),
        ("--distributed.coordinator and --distributed.num-processes", "none of the three"),
    ),
    "a coordinator without a port": (lambda: DistributedConfig("host", 0, 2), ("distributed.coordinator='host'", "HOST:PORT")),
    "a process too many": (lambda: DistributedConfig("host:1", 2, 2), ("distributed.process_id=2", "between 0 and 1")),
    "rows longer than the model": (
        lambda: RunConfig(model=ModelConfig(max_length=64), data=DataConfig(sequence_length=128)),
        ("data.sequence_length=128", "model.max_length=64", "--model.max-length"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_message(case):
    build, parts = REFUSED[case]
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_defaults_are_valid():
    config = RunConfig()
    assert config.model.head_width * config.model.num_heads == config.model.hidden_size
    assert config.directory == "runs/run"
    assert RunConfig(name="x", run_dir="elsewhere").directory == "elsewhere"


def test_a_changed_copy_is_validated_again():
    with pytest.raises(UserError, match="num_experts=1"):
        dataclasses.replace(ModelConfig(), num_experts=1)


@pytest.mark.parametrize(("moe_every", "expected"), [(1, (0, 1, 2, 3, 4)), (2, (1, 3)), (5, (4,)), (6, ())])
def test_moe_layers_end_each_period(moe_every, expected):
    assert ModelConfig(num_layers=5, moe_every=moe_every).moe_layers == expected


def test_path_replaces_the_domains():
    assert [domain.name for domain in DataConfig().sources] == ["prose", "code", "sql"]
    assert DataConfig(path="books").sources == (Domain("text", "books"),)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


CONFIGS = [
    RunConfig(),
    RunConfig(
        name="other",
        run_dir="somewhere",
        model=ModelConfig(head_size=24, eos_token_ids=(2, 5), bos_token_id=None, attention_window=17),
        mesh=MeshConfig(expert=4),
        data=DataConfig(domains=(Domain("a", "a.txt", "text"),), stages=(Stage(100, {"a": 2.0}), Stage(None, {"a": 1}))),
        train=TrainConfig(optimizer="muon"),
        sample=SampleConfig(ignore_eos=True),
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_json_round_trip(config):
    text = json.dumps(to_json(config))
    assert run_from_json(json.loads(text)) == config
    assert model_from_json(json.loads(text)["model"]) == config.model


def test_json_of_an_older_version_keeps_defaults():
    values = to_json(ModelConfig(num_experts=16))
    del values["scan_layers"]
    assert model_from_json(values) == ModelConfig(num_experts=16)
    run = to_json(RunConfig())
    del run["distributed"]
    assert run_from_json(run) == RunConfig()


@pytest.mark.parametrize("section", ["model", "mesh", "distributed", "data", "train", "sample"])
def test_json_with_an_unknown_field_names_the_nearest(section):
    values = to_json(RunConfig())
    field = next(iter(values[section]))
    values[section][field + "s"] = 1
    with pytest.raises(UserError, match=rf"here.json.*unknown field '{field}s'.*'{field}'"):
        run_from_json(values, where="here.json")
