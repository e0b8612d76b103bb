"""Loss by length: the same targets at every length, what one pass gives for each, and text that is too short."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from moejax.config import UserError
from moejax.evals import lengths
from moejax.evals.lengths import Arguments, choose_windows, measure_length, run
from moejax.evals.scalings import parse_scaling, scale_model


def test_windows_end_at_the_same_targets_and_no_target_counts_twice():
    documents = [list(range(1000, 1041)), list(range(10)), list(range(2000, 2033))]
    windows = choose_windows(documents, longest=16, scored=4, count=100)
    assert windows.tokens.shape == (7 + 5, 16)
    for length in (4, 8, 16):
        tokens, targets = windows.cut(length, None)
        assert np.array_equal(tokens[:, 1:], targets[:, :-1]) and tokens.shape == (12, length)
        assert np.array_equal(targets[:, -4:], windows.targets[:, -4:])
        assert np.array_equal(windows.cut(length, 1)[0][:, 1:], tokens[:, 1:]) and set(windows.cut(length, 1)[0][:, 0]) == {1}
    scored = windows.targets[:, -4:].ravel().tolist()
    assert len(set(scored)) == len(scored) and max(scored) == 2032
    fewer = choose_windows(documents, longest=16, scored=4, count=3)
    assert np.array_equal(fewer.tokens, windows.tokens[[0, 4, 8]])
    with pytest.raises(UserError, match=r"lengths has 64, but the longest document has 41 tokens"):
        choose_windows(documents, longest=64, scored=4, count=3)


@pytest.fixture
def text():
    return " ".join(f"the pass key of {number * 7919 % 10007} is {number}" for number in range(40))


def check_row(row, model, variables, tokenizer, ids, ends):
    """The row's losses are those of whole windows [BOS, ids before the end], each in one pass, as numpy adds them up."""
    length = row["length"]
    tokens = np.array([[1, *ids[end - length : end - 1]] for end in ends], np.int32)
    targets = np.array([ids[end - length : end] for end in ends], np.int32)
    logits = np.asarray(jax.jit(model.apply)(variables, tokens).logits, np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    assert row["nats_a_token"] == pytest.approx(losses[:, -8:].mean(), abs=1e-4)
    assert row["nats_all_positions"] == pytest.approx(losses.mean(), abs=1e-4)
    assert row["nats_by_position"] == pytest.approx(losses.reshape(len(ends), 4, -1).mean(axis=(0, 2)), abs=1e-4)
    spelled = sum(len(tokenizer.decode(part[-8:].tolist(), is_start=False)) for part in targets)
    assert row["bits_per_byte"] == pytest.approx(losses[:, -8:].sum() / math.log(2) / spelled, rel=1e-4)


def test_the_losses_of_a_length_are_those_of_one_pass(model, variables, tokenizer, text):
    ids = tokenizer.encode(text, add_bos=False)
    windows = choose_windows([ids], 48, 8, 3)
    ends = [range(49, len(ids) + 1, 8)[place * len(range(49, len(ids) + 1, 8)) // 3] for place in range(3)]
    arguments = Arguments(lengths=(48,), scored=8, bins=4, chunk=20, batch_size=2)
    check_row(measure_length(model, variables, tokenizer, windows, 48, arguments), model, variables, tokenizer, ids, ends)


@pytest.mark.slow
def test_the_command_gives_every_length_and_scaling(tmp_path, saved, model, variables, tokenizer, text, capsys):
    (tmp_path / "text.txt").write_text(text)
    run(
        Arguments(
            checkpoint=str(saved), text=str(tmp_path / "text.txt"), lengths=(48, 24), scored=8, windows=5, bins=4, chunk=20, batch_size=2,
            scalings=("checkpoint", "linear:2"), json="-", figure=str(tmp_path / "lengths.svg"),
        )
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    ids = tokenizer.encode(text, add_bos=False)
    ends = range(49, len(ids) + 1, 8)
    assert (result["evaluation"], result["windows"], result["original_length"]) == ("lengths", 5, 32)
    assert [row["name"] for row in result["rows"]] == ["checkpoint, 24", "checkpoint, 48", "linear:2, 24", "linear:2, 48"]
    scaled = scale_model(model, parse_scaling("linear:2"), 32)
    for row in result["rows"]:
        used = model if row["scaling"] == "checkpoint" else scaled
        check_row(row, used, variables, tokenizer, ids, [ends[place * len(ends) // 5] for place in range(5)])
    assert (tmp_path / "lengths.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (256, 64)}, r"lengths=\(256, 64\); expected one length or more, none below scored=128"),
        ({"scored": 0}, "scored=0 must be above 0"),
        ({"scalings": ("yarn",)}, "scalings has 'yarn'"),
        ({"text": "a", "domain": "b"}, "text and domain were both given"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Arguments(**fields)


def test_a_published_model_held_nothing_out(saved):
    with pytest.raises(UserError, match=r"is of no run of ours, so nothing was held out; name a text .* with --text$"):
        lengths.run(Arguments(checkpoint=str(saved), lengths=(128,)))
