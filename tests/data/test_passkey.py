"""Passkey texts have one key, where they say it is, and come out the same again."""

from __future__ import annotations

import random
import re

import pytest

from moejax.data.passkey import FILLER, INSTRUCTION, KEY_DIGITS, QUESTION, draw_key, generate_document, write_answer, write_prompt


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sentences", [0, 1, 7, 40])
def test_a_prompt_has_one_key_at_its_depth(sentences, depth):
    text = write_prompt("31415", sentences, depth)
    assert re.findall(r"\d+", text) == ["31415", "31415"]
    before, after = text.split("The pass key is 31415. Remember it. 31415 is the pass key.")
    counts = [sum(part.count(sentence) for sentence in FILLER) for part in (before, after)]
    assert sum(counts) == sentences and counts[0] == round(depth * sentences)
    assert text.startswith(INSTRUCTION) and text.endswith(QUESTION)
    assert (text + write_answer("31415")).endswith("The pass key is 31415.")


def test_documents_are_reproducible_and_differ():
    first = [generate_document(0, index) for index in range(300)]
    assert first[:20] == [generate_document(0, index) for index in range(20)]
    assert not set(first) & {generate_document(1, index) for index in range(300)} and len(set(first)) == 300
    for document in first:
        keys = re.findall(r"\d+", document)
        assert len(keys) == 5 and len(set(keys)) == 1 and document.endswith(f"{QUESTION} {keys[0]}.\n")


def test_keys_have_their_digits():
    rng = random.Random(0)
    keys = {draw_key(rng) for _ in range(1000)}
    assert {len(set(key)) for key in keys} == {len(key) for key in keys} == {KEY_DIGITS}
    assert len(keys) > 900 and all({key[place] for key in keys} == set("0123456789") for place in range(KEY_DIGITS))
