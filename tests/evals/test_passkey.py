"""Passkey retrieval: one key at its depth in a prompt of the length, 1 for a model that reads, chance for one that guesses."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from moejax.config import UserError
from moejax.data.passkey import FILLER
from moejax.evals import passkey
from moejax.evals.passkey import Arguments, ask, make_prompts, measure_length, read_answers, run
from moejax.evals.scalings import parse_scaling, scale_model


@pytest.mark.parametrize("length", [160, 400])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_prompts_are_as_long_as_they_may_be_with_one_key_at_its_depth(tokenizer, length, depth):
    prompts = make_prompts(tokenizer, length, depth, 5, seed=0)
    assert len({prompt.key for prompt in prompts}) == 5
    assert [prompt.key for prompt in prompts] == [prompt.key for prompt in make_prompts(tokenizer, 160, 0.5, 5, seed=0)]
    for prompt in prompts:
        text = tokenizer.decode(prompt.tokens)
        before, after = text.split(f"The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.")
        counts = [sum(part.count(sentence) for sentence in FILLER) for part in (before, after)]
        assert counts[0] == round(depth * sum(counts)) and sum(counts) > 0
        assert set(re.findall(r"\d+", text)) == {prompt.key} and prompt.tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode([*prompt.tokens, *prompt.answer]) == f"{text} {prompt.key}."
        longest = max(len(tokenizer.encode(" " + sentence, add_bos=False)) for sentence in FILLER)
        assert length - longest <= len(prompt.tokens) + len(prompt.answer) <= length


def test_a_prompt_that_has_no_room_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"lengths has 20, but instruction, key and question alone take \d+ tokens"):
        make_prompts(tokenizer, 20, 0.5, 1, seed=0)


def test_a_reader_is_right_in_all_and_a_guesser_by_chance(tokenizer):
    arguments = Arguments(keys=90, depths=(0.0, 1.0), batch_size=64)
    random = np.random.default_rng(0)

    def read(tokens, lengths, answers):
        """Finds the key in the prompt, as a model should, and says it."""
        keys = [re.findall(r"\d+", tokenizer.decode(row[:count].tolist()))[0] for row, count in zip(tokens, lengths, strict=True)]
        said = [tokenizer.encode(f"is {key}.", add_bos=False)[-answers.shape[1] :] for key in keys]
        return np.array(said)

    def guess_first_digit(tokens, lengths, answers):
        """Knows all but the first digit."""
        guessed, ids = read(tokens, lengths, answers), [tokenizer.encode(f"is {digit}", add_bos=False)[-1] for digit in range(1, 10)]
        place = int(np.argmax(np.isin(guessed[0], ids)))
        guessed[:, place] = random.choice(ids, len(guessed))
        return guessed

    assert measure_length(read, tokenizer, 200, arguments)["accuracy_by_depth"] == [1.0, 1.0]
    shares = measure_length(guess_first_digit, tokenizer, 200, arguments)
    assert shares["accuracy"] == pytest.approx(1 / 9, abs=0.09)
    assert shares["depth 0"] == shares["accuracy_by_depth"][0]


def test_one_wrong_token_is_a_wrong_answer_and_filling_up_is_not_counted(tokenizer):
    prompts = make_prompts(tokenizer, 160, 0.5, 5, seed=0)

    def read(tokens, lengths, answers):
        likeliest = answers.copy()
        likeliest[0, -1] += 1  # the first of each batch of 4: prompts 0 and 4
        return likeliest

    assert ask(read, prompts, 4).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("scaling", ["none", "dynamic:2"])
@pytest.mark.slow
def test_one_pass_over_the_answer_is_greedy_decoding(model, variables, tokenizer, scaling):
    scaled = scale_model(model, parse_scaling(scaling), 32)
    prompts = make_prompts(tokenizer, 150, 0.5, 2, seed=0)
    lengths = np.array([len(prompt.tokens) - place for place, prompt in enumerate(prompts)])
    tokens = np.array([prompt.tokens for prompt in prompts], np.int32)
    apply = jax.jit(scaled.apply)
    greedy = []
    for row, length in zip(tokens, lengths, strict=True):
        ids = row[:length].tolist()
        for _ in range(3):  # rows of the cache's size, so that dynamic scaling is that of the cache
            logits = apply(variables, np.array([ids + [0] * (150 - len(ids))], np.int32)).logits
            ids.append(int(np.argmax(logits[0, len(ids) - 1])))
        greedy.append(ids[length:])
    assert read_answers(scaled, variables, tokens, lengths, np.array(greedy, np.int32), 150, chunk=64).tolist() == greedy


@pytest.mark.slow
def test_the_command_tells_every_length_and_scaling(tmp_path, saved, capsys):
    run(
        Arguments(
            checkpoint=str(saved), lengths=(160, 144), depths=(0.0, 0.5), keys=2, batch_size=2, scalings=("none", "linear:2"),
            json=str(tmp_path / "p.json"), figure=str(tmp_path / "p.svg"),
        )
    )  # fmt: skip
    result = json.loads((tmp_path / "p.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["none, 144", "none, 160", "linear:2, 144", "linear:2, 160"]
    assert all(row["accuracy"] == 0 and row["accuracy_by_depth"] == [0, 0] for row in result["rows"])
    assert {"evaluation", "checkpoint", "seconds", "device", "date", "command"} <= result.keys()
    assert "| none, 144" in capsys.readouterr().out and (tmp_path / "p.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (0.0, 1.5)}, r"depths=\(0.0, 1.5\); expected one or more from 0 \(the beginning\) to 1 \(the end\)"),
        ({"lengths": ()}, r"lengths=\(\); expected one length or more"),
        ({"keys": 0}, "keys=0 must be above 0"),
        ({"scalings": ()}, "scalings is empty"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        passkey.Arguments(**fields)
