"""Published configurations of both families: the presets, both spellings, class defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moejax.config import ModelConfig, UserError
from moejax.families import FAMILIES, get_family
from moejax.families.arctic import ARCTIC_480B
from moejax.families.hf_config import WIRING_FIELDS
from moejax.families.layout import block_leaves, outer_leaves
from moejax.families.mixtral import MIXTRAL_8X7B, MIXTRAL_8X22B

# The fields of the published config.json files.
MIXTRAL_8X7B_JSON = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B_JSON = MIXTRAL_8X7B_JSON | {
    "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536, "num_attention_heads": 48,
    "num_hidden_layers": 56, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "vocab_size": 32768,
}  # fmt: skip
ARCTIC_480B_JSON = {
    "bos_token_id": 31998, "eos_token_id": 31999, "hidden_size": 7168, "intermediate_size": 4864, "max_position_embeddings": 4096,
    "model_type": "arctic", "moe_layer_frequency": 1, "num_attention_heads": 56, "num_experts_per_tok": 2, "num_hidden_layers": 35,
    "num_key_value_heads": 8, "num_local_experts": 128, "parallel_attn_mlp_res": True, "rms_norm_eps": 1e-05, "rope_theta": 10000,
    "router_aux_loss_coef": 0.001, "torch_dtype": "bfloat16", "use_residual": True, "vocab_size": 32000,
}  # fmt: skip
PUBLISHED = [
    ("mixtral", MIXTRAL_8X7B_JSON, MIXTRAL_8X7B),
    ("mixtral", MIXTRAL_8X22B_JSON, MIXTRAL_8X22B),
    ("arctic", ARCTIC_480B_JSON, ARCTIC_480B),
]

GOLDEN_CASES = [
    "mixtral_hf", "mixtral_hf_sharded", "mixtral_hf_sliding_window",
    "arctic_parallel", "arctic_interleaved", "arctic_top1", "arctic_parallel_mixed", "arctic_sliding_window",
]  # fmt: skip


@pytest.mark.parametrize(("family", "values", "preset"), PUBLISHED)
def test_published_config_is_the_preset(family, values, preset):
    assert get_family(family).config_from_hf(values, "config.json") == preset
    written = json.loads(json.dumps(get_family(family).config_to_hf(preset)))
    assert get_family(family).config_from_hf(written, "config.json") == preset
    assert all(written[name] == value for name, value in values.items() if name in written)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_config_export_then_import_is_the_same_model(case, golden):
    values = golden(case).config
    family = get_family(values["model_type"])
    config = family.config_from_hf(values, "config.json")
    assert family.config_from_hf(family.config_to_hf(config), "config.json") == config


def test_presets_are_named_after_config_files_of_their_family():
    for family in FAMILIES.values():
        for preset in family.presets.values():
            assert preset.family == family.name


def test_old_and_new_spelling_are_the_same_model():
    old = {"model_type": "mixtral", "rope_theta": 5e4, "torch_dtype": "bfloat16"}
    new = {
        "model_type": "mixtral", "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "dtype": "bfloat16", "head_dim": None,
        "pad_token_id": None, "sliding_window": None,
    }  # fmt: skip
    for family in FAMILIES.values():
        config = family.config_from_hf(old, "config.json")
        assert config == family.config_from_hf(new, "config.json")
        assert (config.rope_theta, config.dtype, config.param_dtype) == (5e4, "bfloat16", "bfloat16")


def test_class_defaults_of_mixtral():
    config = get_family("mixtral").config_from_hf({}, "config.json")
    published = dataclasses.replace(
        MIXTRAL_8X7B, max_length=131_072, router_aux_loss_coefficient=0.001, dtype="float32", param_dtype="float32"
    )
    assert config == published


def test_class_defaults_of_arctic_are_not_the_published_model():
    config = get_family("arctic").config_from_hf({}, "config.json")
    assert (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads) == (4096, 14_336, 32, 32)
    assert (config.num_kv_heads, config.num_experts, config.experts_per_token) == (32, 8, 1)
    assert (config.moe_every, config.residual_mlp, config.rope_theta, config.max_length) == (2, False, 1e6, 4096)
    assert (config.bos_token_id, config.eos_token_ids, config.top_1_weight) == (1, (2,), "probability")


def test_null_kv_heads_are_one_per_head():
    for family in FAMILIES.values():
        assert family.config_from_hf({"num_attention_heads": 16, "num_key_value_heads": None}, "config.json").num_kv_heads == 16


def test_tokens_may_be_lists_or_null():
    read = get_family("mixtral").config_from_hf
    assert read({"eos_token_id": [2, 7]}, "c").eos_token_ids == (2, 7)
    assert read({"eos_token_id": None}, "c").eos_token_ids == ()
    assert read({"bos_token_id": None}, "c").bos_token_id is None


def test_windows_are_counted_in_keys_seen():
    assert get_family("mixtral").config_from_hf({"sliding_window": 6}, "c").attention_window == 6
    assert get_family("arctic").config_from_hf({"sliding_window": 6, "sink_size": 2}, "c").attention_window == 7


def test_residual_prefers_the_field_of_the_reference():
    read = get_family("arctic").config_from_hf
    assert read({"use_residual": True}, "c").residual_mlp
    assert not read({"use_residual": True, "parallel_attn_mlp_res": False}, "c").residual_mlp


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "x.json: hidden_act is 'gelu'; expected 'silu': no other activation"),
        ({"rope_parameters": {"rope_theta": "many"}}, "rope_theta is 'many'; expected a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotation is not implemented"),
        ({"attention_bias": True}, "attention_bias is True; expected False"),
        ({"attention_dropout": 0.1}, "dropout is not implemented"),
        ({"router_jitter_noise": 0.1}, "router jitter is not implemented"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; expected a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; expected 'float32'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id"),
        ({"num_experts_per_tok": 9}, "more than model.num_experts=8"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family, values, message):
    with pytest.raises(UserError) as error:
        FAMILIES[family].config_from_hf(values, "x.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_deepspeed_moe_implementation": True}, "drops no token, as the plain path"),
        ({"quantization": {"q_bits": 8}}, "quantising at run time is not implemented"),
        ({"head_dim": 64}, "head_dim is 64; expected 128"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_arctic_refuses(values, message):
    with pytest.raises(UserError, match=message):
        get_family("arctic").config_from_hf(values, "config.json")


def test_arctics_deepspeed_path_is_read_where_it_drops_nothing():
    read = get_family("arctic").config_from_hf
    plain = read({"moe_token_dropping": False}, "config.json")
    assert read({"use_deepspeed_moe_implementation": True, "moe_token_dropping": False}, "config.json") == plain


def test_arctics_capacities_are_kept_for_dispatch_capacity():
    family = get_family("arctic")
    values = {"moe_train_capacity_factor": 1.5, "moe_eval_capacity_factor": 2, "moe_min_capacity": 4, "moe_token_dropping": False}
    config = family.config_from_hf(values, "config.json")
    assert (config.capacity_factor, config.min_capacity, config.drop_tokens, config.dispatch) == (1.5, 4, False, "auto")
    assert family.config_from_hf(family.config_to_hf(config), "config.json") == config
    with pytest.raises(UserError, match="moe_min_capacity is 'few'; expected a whole number"):
        family.config_from_hf({"moe_min_capacity": "few"}, "config.json")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ModelConfig(family="mixtral", residual_mlp=True), "residual_mlp"),
        (dataclasses.replace(MIXTRAL_8X7B, moe_every=2), "moe_every"),
        (dataclasses.replace(ARCTIC_480B, top_1_weight="one"), "top_1_weight"),
        (dataclasses.replace(ARCTIC_480B, router_bias=True), "router_bias=True .* no place for"),
        (dataclasses.replace(MIXTRAL_8X7B, router_bias=True), "router_bias=True .* no place for"),
    ],
)
def test_wiring_that_a_family_lacks_is_not_exported(config, field):
    with pytest.raises(UserError, match=f"model.{field}"):
        get_family(config.family).config_to_hf(config)


def test_unknown_family_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'mixtral'"):
        get_family("mixtrall")


def test_every_table_names_every_leaf():
    for family in FAMILIES.values():
        configs = [ModelConfig(family=family.name, residual_mlp=family.name == "arctic")]
        if family.name == "arctic":
            configs.append(dataclasses.replace(configs[0], moe_every=2))
        for table in family.tables:
            leaves = {leaf for config in configs for layer in range(2) for leaf in (*outer_leaves(config), *block_leaves(config, layer))}
            assert leaves == set(table.sources)


def test_wiring_fields_are_fields():
    for name in WIRING_FIELDS:
        assert hasattr(MIXTRAL_8X7B, name)
