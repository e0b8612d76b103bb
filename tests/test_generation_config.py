"""Settings of generation: what they take, what they refuse by name, and how one is spread over rows."""

import numpy as np
import pytest

from moejax.checks import UserError
from moejax.generation_config import GenerationSettings, settings_per_row


@pytest.mark.parametrize(("name", "value"), [
    ("max_new_tokens", -1), ("max_new_tokens", 2.5), ("max_new_tokens", True), ("temperature", -0.1), ("temperature", float("nan")),
    ("temperature", "hot"), ("top_k", -1), ("top_k", None), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("seed", "x"),
    ("ignore_eos", 1), ("repetition_penalty", 0), ("frequency_penalty", float("inf")), ("presence_penalty", [1]),
    ("logit_bias", {"a": 1}), ("logit_bias", {1: "a"}), ("logit_bias", {-1: 1.0}), ("logit_bias", [1]), ("stop", ""), ("stop", [""]),
    ("stop", 5.0), ("stop", [3]), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("logprobs", -1), ("logprobs", True),
    ("prompt_logprobs", 100_000),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^{name}=.*; expected ") as error:
        GenerationSettings(**{name: value})
    assert "\n" not in str(error.value)


def test_what_json_has_is_taken():
    settings = GenerationSettings(stop="end", stop_token_ids=[3], logit_bias={"7": 1})
    assert (settings.stop, settings.stop_token_ids, settings.logit_bias) == (("end",), (3,), {7: 1})
    assert GenerationSettings(stop=None, logit_bias=None) == GenerationSettings()


def test_options_are_one_for_all_or_one_per_row():
    rows = settings_per_row(
        {"temperature": np.array([0.0, 0.5]), "seed": 3, "stop": ["a", "b"], "stop_token_ids": [[1], None], "max_new_tokens": (1, 2)}, 2
    )
    assert [row.temperature for row in rows] == [0.0, 0.5]
    assert [row.seed for row in rows] == [3, 4]
    assert [row.stop for row in rows] == [("a", "b")] * 2
    assert [row.stop_token_ids for row in rows] == [(1,), ()]
    assert [row.max_new_tokens for row in rows] == [1, 2]
    assert [row.seed for row in settings_per_row({"seed": [9, 9]}, 2)] == [9, 9]
    assert settings_per_row({}, 0) == []


@pytest.mark.parametrize(("options", "said"), [
    ({"temperature": [1.0, -1.0]}, "^prompt 1: temperature=-1.0"),
    ({"temperature": -1.0}, "^temperature=-1.0"),
    ({"stop": [["a"], [""]]}, "^prompt 1: stop="),
    ({"top_k": [1, 2, 3]}, "top_k is a list of 3 values, but there are 2 prompts"),
    ({"topk": 3}, "topk is no option of generation; did you mean 'top_k'"),
])  # fmt: skip
def test_errors_name_field_and_row(options, said):
    with pytest.raises(UserError, match=said):
        settings_per_row(options, 2)
