"""The held-out split: whole documents, chosen by a stable hash of their names, for sources of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moejax.config import UserError
from moejax.data.documents import Document, stable_key

HEAD = 16_000_000  # characters; a domain up to this size is split exactly
LIMIT = 32_000_000  # characters held out of one domain at most


def split_documents(documents: Sequence[Document], held_out_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Whole documents into (train, held_out), chosen by a stable hash of their names until the share of the text is reached.

    Documents are taken in the order of their hashes; one that is larger than what is left of the share is passed over.
    Neither side is empty: where every document is larger than the share, the smallest is held out. A single document is
    cut at a line boundary instead (inside the line, if it has one line only), and its last part, at least a line, is held out.
    """
    marked = list(_mark(documents, held_out_fraction, seed))
    return [document for document, held in marked if not held], [document for document, held in marked if held]


def split_stream(documents: Iterator[Document], held_out_fraction: float, seed: int) -> Iterator[tuple[Document, bool]]:
    """Each document with whether it is held out, in their order, without holding more than the first HEAD characters.

    Up to HEAD characters, and at least two documents, are split as `split_documents` does, so that neither side is ever empty. Of
    what follows, a document is held out if its hash falls into the share, until LIMIT characters are: evaluation needs no more.
    """
    head, size = [], 0
    for document in documents:
        head.append(document)
        size += len(document.text)
        if size >= HEAD and len(head) > 1:
            break
    held_out = 0
    if head:
        for document, held in _mark(head, held_out_fraction, seed):
            held_out += len(document.text) if held else 0
            yield document, held
    del head
    for document in documents:
        held = stable_key(document.name, seed + 1) < held_out_fraction * 2**64 and held_out + len(document.text) <= LIMIT
        held_out += len(document.text) if held else 0
        yield document, held


def _mark(documents: Sequence[Document], held_out_fraction: float, seed: int) -> Iterator[tuple[Document, bool]]:
    if len(documents) == 1:
        yield from zip(_split_lines(documents[0], held_out_fraction), (False, True), strict=True)
        return
    sizes = [len(document.text) for document in documents]
    left = held_out_fraction * sum(sizes)
    order = sorted(range(len(documents)), key=lambda i: (stable_key(documents[i].name, seed + 1), i))
    held: set[int] = set()
    for index in order:
        if sizes[index] <= left and len(held) < len(documents) - 1:
            held.add(index)
            left -= sizes[index]
    if not held:
        held.add(min(order, key=lambda i: sizes[i]))
    for index, document in enumerate(documents):
        yield document, index in held


def _split_lines(document: Document, held_out_fraction: float) -> tuple[Document, Document]:
    text = document.text
    if len(text) < 2:
        raise UserError(f"the only document, {document.name!r}, is too short to hold a part of it out; add text to the data path")
    wanted = min(max(int(len(text) * (1 - held_out_fraction)), 1), len(text) - 1)
    cut = text.rfind("\n", 0, wanted) + 1 or text.find("\n", wanted, len(text) - 1) + 1 or wanted
    return Document(document.name, text[:cut]), Document(f"{document.name} (end)", text[cut:])
