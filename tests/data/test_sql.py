"""The synthetic SQL documents run, differ, and come out the same again."""

from __future__ import annotations

import re
import sqlite3

import pytest

from moejax.data.sql import generate_document


@pytest.mark.parametrize("seed", range(3))
def test_every_document_runs_as_it_stands(seed):
    for index in range(60):
        document = generate_document(seed, index)
        connection = sqlite3.connect(":memory:")
        connection.executescript(document)
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0]
        connection.close()
        questions = re.findall(r"^-- (.+)\n(SELECT .+);$", document, re.MULTILINE)
        assert tables in (2, 3) and 3 <= len(questions) <= 10
        assert len({query for _, query in questions}) == len(questions)


def test_documents_are_reproducible_and_differ():
    first = [generate_document(0, index) for index in range(300)]
    assert first[:20] == [generate_document(0, index) for index in range(20)]
    assert len(set(first)) == 300
    assert not set(first) & {generate_document(1, index) for index in range(300)}
    schemas = [document.split("\n-- ")[0] for document in first]
    assert len(set(schemas)) == 300  # a held-out document has a schema of its own
