"""The text of a stream: of all documents, spread evenly, each token once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moejax.config import UserError
from moejax.data.documents import Document
from moejax.evals.stream_text import spread_evenly


class Letters:
    """A tokenizer whose ids are the characters' codes."""

    def encode_batch(self, texts, threads=None):
        return [[ord(letter) for letter in text] for text in texts]


DOMAINS = {
    "many": [Document(f"m{number}", "a" * 97) for number in range(40)],  # 3,600 letters in whole pieces of 10
    "few": [Document("f", "b" * 900)],
    "short": [Document("s", "c" * 9)],
}


@pytest.mark.parametrize("tokens", [4500, 2000, 777])
def test_any_stretch_has_every_domain_in_its_share(tokens):
    ids = spread_evenly(DOMAINS, Letters(), tokens, 10)
    assert (len(ids), ids.dtype) == (tokens, np.int32)
    assert set(Counter(ids.tolist())) == {ord("a"), ord("b")}  # what is shorter than a piece is left out
    for start in range(0, tokens - 200, 50):
        assert Counter(ids[start : start + 200].tolist())[ord("b")] / 200 == pytest.approx(0.2, abs=0.06)


def test_pieces_are_whole_and_none_comes_twice():
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    ids = spread_evenly({"text": [Document("t", letters)]}, Letters(), 1000, 25).reshape(-1, 25)
    assert np.all(np.diff(ids, axis=1) == 1)
    assert len(set(ids.ravel().tolist())) == 1000
    assert not np.all(np.diff(ids[:, 0]) > 0)  # and they are drawn, not read in order


def test_too_little_text_says_what_to_do():
    with pytest.raises(UserError, match=r"tokens=4,501, but the text has only 4,500 in whole pieces of 10; .*--period.*--text.*held-out"):
        spread_evenly(DOMAINS, Letters(), 4501, 10)
