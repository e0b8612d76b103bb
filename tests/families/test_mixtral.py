"""Mistral's params.json: read in both spellings, written back, and refused by name where something else is computed."""

from __future__ import annotations

import dataclasses

import pytest

from moejax.config import UserError
from moejax.families.mixtral import MIXTRAL_8X7B, MIXTRAL_8X22B, config_from_original, config_to_original

PUBLISHED_8X7B = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-05,
    "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}  # fmt: skip
FIRST_RELEASE_8X7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "rms_norm_eps": 1e-05, "vocab_size": 32000, "rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def weights_as_float32(config):
    return dataclasses.replace(config, dtype="float32", param_dtype="float32")


def test_both_spellings_of_8x7b_are_the_preset():
    preset = dataclasses.replace(weights_as_float32(MIXTRAL_8X7B), dtype=config_from_original(PUBLISHED_8X7B).dtype)
    for values, head_size in ((PUBLISHED_8X7B, 128), (FIRST_RELEASE_8X7B, None)):
        config = config_from_original(values)
        assert config == dataclasses.replace(preset, head_size=head_size, param_dtype=config.param_dtype)


@pytest.mark.parametrize("preset", [MIXTRAL_8X7B, MIXTRAL_8X22B, dataclasses.replace(MIXTRAL_8X7B, attention_window=4096, max_length=1000)])
def test_what_is_written_reads_back(preset):
    values = config_to_original(preset)
    back = config_from_original(values)
    for name in ("vocab_size", "hidden_size", "num_kv_heads", "head_width", "num_experts", "max_length", "rope_theta", "attention_window"):
        assert getattr(back, name) == getattr(preset, name)
    assert config_to_original(back) == values


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"_sliding_window": 4096}, 4096),
        ({"sliding_window": [64, 64]}, 64),
        ({"sliding_window": [None]}, None),
        ({"sliding_window": None, "_sliding_window": None}, None),
    ],
)
def test_windows(values, window):
    assert config_from_original(PUBLISHED_8X7B | values).attention_window == window


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_encoder": {"hidden_size": 1024}}, "images are not read"),
        ({"lora": {"rank": 4, "scaling": 2.0}}, "adapter that is not merged"),
        ({"model_type": "mamba"}, "model_type is 'mamba'; expected 'transformer'"),
        ({"moe": None}, "a dense Mistral is not implemented"),
        ({"moe": {"num_experts": 8}}, "x.json: moe: num_experts_per_tok is None; expected a whole number"),
        ({"dim": "4096"}, "dim is '4096'; expected a whole number"),
        ({"sliding_window": [64, None]}, "one window for all layers"),
        ({"yarn": {"factor": 2}}, "moejax does not know this field"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values, message):
    with pytest.raises(UserError) as error:
        config_from_original(PUBLISHED_8X7B | values, "x.json")
    assert message in str(error.value) and "x.json" in str(error.value)


def test_the_first_releases_spelling_must_say_its_rope():
    values = {name: value for name, value in FIRST_RELEASE_8X7B.items() if name != "rope_theta"}
    with pytest.raises(UserError, match=r"rope_theta is missing.*1000000\.0"):
        config_from_original(values)


def test_a_tied_head_has_no_place_in_it():
    with pytest.raises(UserError, match=r"model.tie_embeddings=True cannot be written as a mixtral params.json"):
        config_to_original(dataclasses.replace(MIXTRAL_8X7B, tie_embeddings=True))
    with pytest.raises(UserError, match=r"router_bias=True .* no place for"):
        config_to_original(dataclasses.replace(MIXTRAL_8X7B, router_bias=True))
