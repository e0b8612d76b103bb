"""Python modules split into their prose and their code."""

from __future__ import annotations

import ast
import random
import re
import warnings

import pytest

from moejax.data import python_text

SOURCE = '''#!/usr/bin/env python
# Copyright (c) Somebody. All rights reserved, and this is no prose that anyone wants to read.
"""Module text, which is long enough to be kept as prose by the reader.

A second paragraph of the module text that goes on for a while.
"""  # and a comment

import os  # trailing


# A comment of two lines that explains something at length,
# as comments do when they are worth reading at all.


def empty():
    """Only a docstring, of a function that does nothing at all."""


def work(path):  # why
    """Says what it does."""
    # inside

    text = "# no comment"
    table = """keep


    this"""
    return [text,

            # between
            table]


def another(first, second, third):
    with open(first) as file, open(second, "w") as other:
        other.write(file.read().upper() + third)


class Thing: "one line"
'''


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not python_text._is_text(s)] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
        for name in ("orelse", "finalbody"):
            if isinstance(getattr(node, name, None), list):
                setattr(node, name, [s for s in getattr(node, name) if not python_text._is_text(s)])
    return ast.dump(tree)


def test_code_is_what_is_left(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    code = python_text.read_code(path)
    assert without_docstrings(ast.parse(code)) == without_docstrings(ast.parse(SOURCE))
    for gone in ("Copyright", "Module text", "trailing", "explains", "Only a", "# why", "# inside", "# between", "one line"):
        assert gone not in code
    assert '"# no comment"' in code and '"""keep\n\n\n    this"""' in code  # strings stay as they are
    assert "def empty():\n    pass\n" in code
    assert code.startswith("import os\n\ndef empty")


def test_prose_is_the_rest(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    seen: set[bytes] = set()
    ((name, prose),) = python_text.read_prose("module", path, seen)
    assert name == "module"
    assert prose.index("Module text") < prose.index("A second") < prose.index("A comment of two lines") < prose.index("Only a docstring")
    assert "explains something at length,\nas comments" in prose
    assert "Copyright" not in prose and "import os" not in prose and "usr/bin" not in prose
    assert list(python_text.read_prose("copy", path, seen)) == []  # every paragraph was met before


@pytest.mark.parametrize("seed", range(4))
def test_the_standard_librarys_code_keeps_its_meaning(seed):
    modules = python_text.standard_library_modules()
    for name in random.Random(seed).sample(sorted(modules), 25):
        source = python_text._read_text(modules[name])
        tree = python_text._parse(source) if source else None
        code = python_text.read_code(modules[name])
        if tree is None or code is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert without_docstrings(ast.parse(code)) == without_docstrings(tree), name
        strings = re.sub(python_text._STRING, "", code, flags=re.DOTALL)
        assert "#" not in strings and "\n\n\n" not in strings, name


def test_what_is_no_code_is_left_out(tmp_path):
    path = tmp_path / "table.py"
    for text in (
        "x = 1\n",
        "def broken(:\n" * 50,
        "table = (\n" + "    'abcdef',\n" * 100 + ")\n",
        "n = [\n" + "    0x1234, 5678,\n" * 100 + "]\n",
    ):
        path.write_text(text)
        assert python_text.read_code(path) is None
    path.write_bytes(b"x = '\xff'\n" * 100)
    assert python_text.read_code(path) is None and list(python_text.read_prose("x", path, set())) == []


def test_modules_are_found_without_tests_and_without_importing():
    modules = python_text.standard_library_modules()
    assert {"json", "json.decoder", "ast", "pydoc_data.topics"} <= modules.keys()
    assert not any(name.startswith(("test.", "idlelib", "encodings")) or ".tests." in name for name in modules)
    assert "numpy" in python_text.package_modules("numpy")
    assert python_text.package_modules("no_such_package_anywhere") == {}
    topics = dict(python_text.read_prose("pydoc_data.topics", modules["pydoc_data.topics"], set()))
    assert "pydoc_data.topics.assert" in topics and len(topics) > 50
