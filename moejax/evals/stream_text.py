"""One long text to be read without end: pieces of many documents, those of each domain spread evenly over the whole."""

import random
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.config import UserError
from moejax.data.documents import Document
from moejax.data.text import Tokenizer


def spread_evenly(domains: Mapping[str, Sequence[Document]], tokenizer: Tokenizer, tokens: int, piece: int, seed: int = 0) -> np.ndarray:
    """Token ids [tokens], in pieces of `piece` tokens drawn from all documents, each domain's spread evenly over the whole.

    Any long stretch is then of the same kind of text as any other. A domain has the share that it has of all text. No BOS and no EOS
    stand in it. Raises UserError where there is less text.
    """
    drawn = random.Random(seed)
    placed: list[tuple[float, str, list[int]]] = []
    pieces: dict[str, list[list[int]]] = {}
    for name, documents in domains.items():
        encoded = tokenizer.encode_batch([document.text for document in documents])
        pieces[name] = [ids[start : start + piece] for ids in encoded for start in range(0, len(ids) - piece + 1, piece)]
        drawn.shuffle(pieces[name])
    found = piece * sum(map(len, pieces.values()))
    if found < tokens:
        raise UserError(
            f"tokens={tokens:,}, but the text has only {found:,} in whole pieces of {piece}; ask for fewer, let the text repeat with "
            "--period, name a longer one with --text, or train with a larger --data.held-out-fraction"
        )
    for name, own in pieces.items():
        used = own[: -(-len(own) * tokens // found)]
        placed += [((place + 0.5) / len(used), name, ids) for place, ids in enumerate(used)]
    joined = [id for *_, ids in sorted(placed) for id in ids]
    return np.array(joined[:tokens], np.int32)
