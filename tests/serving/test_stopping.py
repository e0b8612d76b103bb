"""Stop strings: found however tokens are cut, never shown, and nothing shown is taken back."""

import random

import pytest

from moejax.data.text import train_tokenizer
from moejax.serving.stopping import StoppingDecoder

TOKENIZER = train_tokenizer(["abcabdab cab é acab bac\n" * 30], 300)


@pytest.mark.parametrize("seed", range(40))
def test_text_is_what_stands_before_the_first_stop_string(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("abcdé ", k=40))
    stops = ["".join(rng.choices("abcé", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
    ids = TOKENIZER.encode(text, add_bos=False)
    decoder, pieces, expected, stopped = StoppingDecoder(TOKENIZER, stops), [], text, False
    for count, id in enumerate(ids, 1):
        pieces.append(decoder.push(id))
        places = [place for stop in stops if (place := TOKENIZER.decode(ids[:count], is_start=False).find(stop)) >= 0]
        if places and not stopped:
            expected, stopped = text[: min(places)], True
        assert decoder.stopped == stopped
        assert expected.startswith("".join(pieces)) or not stopped
    pieces.append(decoder.finish())
    assert "".join(pieces) == expected


def test_only_what_may_begin_a_stop_string_is_held_back():
    decoder = StoppingDecoder(TOKENIZER, ["dab"])
    said = [decoder.push(id) for character in "cadac" for id in TOKENIZER.encode(character, add_bos=False)]
    assert said == ["c", "a", "", "", "dac"]
    assert decoder.finish() == ""
    assert not decoder.stopped
