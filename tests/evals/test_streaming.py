"""A stream read in four ways: each is what it says it is, whatever the division into calls, and the report compares like with like."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.config import ModelConfig, UserError
from moejax.data.text import train_tokenizer
from moejax.evals import streaming
from moejax.evals.__main__ import main
from moejax.evals.streaming import Arguments, make_cache, make_stream, read_stream, score_fresh_rows
from moejax.model.transformer import Transformer, abstract_parameters
from tests.conftest import write_text

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=3, max_length=16,
    scan_layers=False,
)  # fmt: skip
SIZES = Arguments(tokens=120, sinks=2, window=10, full_tokens=60, early=(20, 60), block=20, chunk=20, piece=10)
MODEL = Transformer(CONFIG)
STREAM = np.random.default_rng(0).integers(3, 300, 121, dtype=np.int32)


@pytest.fixture(scope="module")
def variables():
    random = np.random.default_rng(0)
    return {"params": jax.tree.map(lambda a: jnp.asarray(random.normal(0.05, 0.3, a.shape), a.dtype), abstract_parameters(CONFIG))}


def losses(variables, way, arguments=SIZES):
    return [block.loss for block in read_stream(MODEL, variables, STREAM, way, arguments, 16)]


def block_means(logits, targets):
    logarithms = jax.nn.log_softmax(logits[0], axis=-1)
    return -np.asarray(jnp.take_along_axis(logarithms, targets[:, None], axis=-1)[:, 0]).reshape(-1, 20).mean(axis=1)


def test_all_tokens_kept_is_one_forward_pass_and_ends_where_it_is_told(variables):
    logits = MODEL.apply(variables, STREAM[None, :60]).logits
    np.testing.assert_allclose(losses(variables, "full"), block_means(logits, STREAM[1:61]), rtol=1e-5)


@pytest.mark.slow
def test_the_window_sees_as_many_tokens_as_the_sinks_and_theirs(variables):
    """As in a model with that window of its own."""
    windowed = Transformer(dataclasses.replace(CONFIG, attention_window=12))
    expected = block_means(windowed.apply(variables, STREAM[None, :120]).logits, STREAM[1:])
    np.testing.assert_allclose(losses(variables, "window"), expected, rtol=1e-5)
    assert make_cache(MODEL, variables, "window", SIZES).capacity == make_cache(MODEL, variables, "sinks", SIZES).capacity == 12


@pytest.mark.slow
def test_sinks_are_another_thing_and_the_division_into_calls_is_not(variables):
    sinks = losses(variables, "sinks")
    np.testing.assert_allclose(losses(variables, "sinks", dataclasses.replace(SIZES, chunk=4)), sinks, rtol=1e-5)
    assert np.max(np.abs(np.array(sinks) - losses(variables, "window"))) > 1e-3
    wide = dataclasses.replace(SIZES, tokens=60, early=(0, 60), window=58)  # nothing leaves it
    np.testing.assert_allclose(losses(variables, "sinks", wide), losses(variables, "full"), rtol=1e-5)


@pytest.mark.slow
def test_rows_begin_with_the_first_token_and_see_their_own(variables):
    found = score_fresh_rows(MODEL, variables, STREAM, 16)
    assert found.shape == (120,)
    for start in (0, 16, 112):
        targets = STREAM[1 + start : 1 + start + 16]
        logits = MODEL.apply(variables, np.concatenate([STREAM[:1], targets[:-1]])[None]).logits
        expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[0])), targets[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(found[start : start + 16], expected, rtol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory, variables):
    """A checkpoint of no run, and text for it."""
    folder = tmp_path_factory.mktemp("place")
    write_text(folder / "text")
    tokenizer = train_tokenizer([path.read_text() for path in (folder / "text").iterdir()], 300)
    moejax.save(folder / "model", MODEL, variables, tokenizer)
    return folder, tokenizer


def test_the_text_repeats_after_its_period(place):
    folder, tokenizer = place
    arguments = dataclasses.replace(SIZES, text=str(folder / "text"), period=50)
    stream = make_stream(arguments, None, tokenizer)
    assert (len(stream), stream[0]) == (121, tokenizer.bos_token_id)
    assert stream[1:71].tolist() == stream[51:].tolist()
    assert len(set(stream[1:51].tolist())) > 10


@pytest.mark.slow
def test_the_report_compares_the_last_tokens_with_early_ones(place, capsys, tmp_path):
    folder, _ = place
    named = {"checkpoint": str(folder / "model"), "text": str(folder / "text"), "json": "-", "figure": str(tmp_path / "figure.svg")}
    streaming.run(dataclasses.replace(SIZES, **named))
    result = json.loads(capsys.readouterr().out)
    assert (result["evaluation"], result["trained_length"], result["sinks"], result["window"]) == ("streaming", 16, 2, 10)
    rows = {row["name"]: row for row in result["rows"]}
    assert [(name, row["tokens"]) for name, row in rows.items()] == [("sinks", 120), ("window", 120), ("full", 60), ("rows", 120)]
    for name in ("sinks", "window", "rows"):
        values = rows[name]["loss_by_block"]
        assert rows[name]["early_loss"] == pytest.approx(np.mean(values[1:3]))
        assert rows[name]["late_loss"] == pytest.approx(np.mean(values[4:]))
        assert rows[name]["late_over_early"] == pytest.approx(rows[name]["late_loss"] / rows[name]["early_loss"])
    assert "late_over_early" not in rows["full"]
    assert rows["sinks"]["cache_bytes"] == rows["window"]["cache_bytes"] == 2 * 12 * 2 * 8 * 4 + 4
    assert min(rows["sinks"]["seconds_by_block"]) > 0 and rows["rows"]["seconds_by_block"] == [None] * 6
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 130}, "tokens=130 is no multiple of block=20"),
        ({"chunk": 7}, "chunk=7 does not divide block=20"),
        ({"early": (60, 20)}, r"early=\(60, 20\) must be two multiples of block=20"),
        ({"early": (20, 400)}, "within tokens=120"),
        ({"sinks": -1}, "sinks=-1 must be 0 or more"),
        ({"window": 0}, "window=0 must be above 0"),
        ({"ways": ("sinks", "sync")}, "ways has 'sync'; expected some of sinks, window, full, rows"),
    ],
)
def test_what_makes_no_sense_names_its_field(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SIZES, **fields)


def test_the_command_refuses_before_a_model_is_read():
    for words, message in ((["--tokens", "1001"], "tokens=1001 is no multiple of block=1000"), ([], "streaming asks a model; name one")):
        with pytest.raises(UserError, match=message):
            main(["streaming", *words])


@pytest.mark.slow
def test_a_hundred_thousand_tokens_later_the_same_text_costs_and_gives_the_same(variables):
    """No slope in the loss of a text that repeats, and no memory that grows."""
    arguments = dataclasses.replace(SIZES, tokens=100_000, full_tokens=1000, block=1000, chunk=500, early=(1000, 51_000))
    stream = np.concatenate([STREAM[:1], np.resize(np.random.default_rng(1).integers(3, 300, 1000, dtype=np.int32), 100_000)])
    blocks = list(read_stream(MODEL, variables, stream, "sinks", arguments, 16))
    np.testing.assert_allclose([block.loss for block in blocks[2:]], blocks[1].loss, rtol=1e-5)
    if blocks[0].resident_bytes is not None:
        assert blocks[-1].resident_bytes < blocks[10].resident_bytes + 20_000_000
