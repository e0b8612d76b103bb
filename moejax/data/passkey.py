"""Passkey texts: a number hidden in text that says nothing, and asked for at the end.

The wording is that of Mohtashami & Jaggi, "Random-Access Infinite Context Length for Transformers" (2023, arXiv 2305.16300), appendix:
an instruction, filler, the key stated twice, filler, the question. Here a key has KEY_DIGITS digits, no two of them alike, so that each but
the first is known by the one before it. Documents to train on ask again and again, with filler in between, so that a small model sees
the answer at many distances.
"""

from __future__ import annotations

import random

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
QUESTION = "What is the pass key? The pass key is"
KEY_DIGITS = 5
_QUESTIONS = 3  # of a document
_LONGEST_FILLER = 20  # sentences before the key, and before each question, of a document


def write_prompt(key: str, sentences: int, depth: float) -> str:
    """The text up to the key that is asked for: `sentences` of filler, of which the share `depth` (0 to 1) stands before the key.

    The answer is a space, the key and a full stop. Filler repeats its five sentences in order, across the key too.
    """
    before = round(depth * sentences)
    return " ".join([INSTRUCTION, *_fill(0, before), _state(key), *_fill(before, sentences), QUESTION])


def write_answer(key: str) -> str:
    """What continues the prompt of a key."""
    return f" {key}."


def draw_key(rng: random.Random) -> str:
    """KEY_DIGITS different digits."""
    return "".join(rng.sample("0123456789", KEY_DIGITS))


def generate_document(seed: int, index: int) -> str:
    """Document `index` of the endless series of `seed`: a prompt and its answer, then further questions and answers behind more filler."""
    rng = random.Random(f"moejax passkey {seed} {index}")
    key = draw_key(rng)
    place = _draw_filler(rng)
    parts = [INSTRUCTION, *_fill(0, place), _state(key)]
    for _ in range(_QUESTIONS):
        before, place = place, place + _draw_filler(rng)
        parts += [*_fill(before, place), QUESTION + write_answer(key)]
    return " ".join(parts) + "\n"


def _fill(start: int, stop: int) -> list[str]:
    return [FILLER[number % len(FILLER)] for number in range(start, stop)]


def _draw_filler(rng: random.Random) -> int:
    """Sentences in one place: mostly few, for what is found near by is learned first."""
    return int((_LONGEST_FILLER + 1) * rng.random() ** 2)


def _state(key: str) -> str:
    return f"The pass key is {key}. Remember it. {key} is the pass key."
