"""Python modules as text: the prose in them (docstrings and comments), or the code without it.

Comments are found with one regular expression that steps over string literals, and so is prose; what is cut from code
as a docstring is found with `ast`. Both run at C speed, where `tokenize` would take longer than all the rest of the set-up.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {
    "__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "pydoc_data", "encodings",
    "_bundled", "__phello__",
}  # fmt: skip
# Python's string literals; a prefix (r, b, f) changes nothing about where they end.
_STRING = r'"""(?:[^\\"]|\\.|"(?!""))*"""' + r"|'''(?:[^\\']|\\.|'(?!''))*'''" + r'|"(?:[^"\\\n]|\\.)*"' + r"|'(?:[^'\\\n]|\\.)*'"
_STRING_OR_COMMENT = re.compile(rf"{_STRING}|#[^\n]*", re.DOTALL)
# A line's end with its comment, and with the blank and comment-only lines that follow; a lone newline is left alone.
_STRING_OR_GAP = re.compile(
    rf"(?P<string>{_STRING})|(?P<gap>[ \t\f]*#[^\n]*(?:\n[ \t\f]*(?:#[^\n]*)?(?=\n|\Z))*|(?:\n[ \t\f]*(?:#[^\n]*)?(?=\n|\Z))+)", re.DOTALL
)
_REST_OF_LINE = re.compile(rb"[ \t\f]*(?:#|\n|\Z)")
_LICENCE = re.compile(r"copyright|licen[cs]e|warrant(?:y|ies)|all rights reserved|SPDX|permission to use|redistribut", re.IGNORECASE)
_MARKS = re.compile(r"^(?:type:|noqa|pylint:|fmt:|yapf:|ruff:|mypy:|pytype:|pragma|-\*-|!|TODO)", re.IGNORECASE)


def standard_library_root() -> str:
    """The directory of the standard library's modules."""
    return sysconfig.get_paths()["stdlib"]


def standard_library_modules() -> dict[str, Path]:
    """Module name -> file, for the standard library without its tests and without text tables."""
    return _modules_under(Path(standard_library_root()), prefix="")


def package_modules(package: str) -> dict[str, Path]:
    """Module name -> file, for an installed package without its tests; empty where it is not installed. Imports nothing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return {}
    modules: dict[str, Path] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        modules |= _modules_under(Path(folder), prefix=f"{package}.")
    return modules


def _modules_under(root: Path, prefix: str) -> dict[str, Path]:
    modules = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and name.isidentifier()]
        for file in files:
            stem = file.removesuffix(".py")
            if stem == file or not stem.isidentifier() or stem.startswith(("test_", "_sysconfigdata")) or stem.endswith("_test"):
                continue
            parts = [*Path(folder).relative_to(root).parts, *([] if stem == "__init__" else [stem])]
            modules[(prefix + ".".join(parts)).removesuffix(".") or "__init__"] = Path(folder, file)
    if not prefix and (root / "pydoc_data" / "topics.py").is_file():
        modules["pydoc_data.topics"] = root / "pydoc_data" / "topics.py"
    return modules


def _read_text(path: Path) -> str | None:
    """A module's text with line ends as \\n; None where it cannot be read as UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def _parse(source: str) -> ast.Module | None:
    """The module's tree; None where it does not parse (packages ship templates too)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _statement_lists(tree: ast.AST) -> Iterator[tuple[ast.AST, list[ast.stmt]]]:
    """Every list of statements with its owner; expressions, the bulk of the tree, are not visited."""
    pending: list[ast.AST] = [tree]
    while pending:
        owner = pending.pop()
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(owner, name, None)
            if isinstance(statements, list) and statements:
                yield owner, statements
                pending.extend(s for s in statements if hasattr(s, "body") or hasattr(s, "cases"))
        pending.extend(getattr(owner, "handlers", ()))
        pending.extend(getattr(owner, "cases", ()))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


def read_code(path: Path) -> str | None:
    """A module's code without docstrings and comments, its layout kept, runs of blank lines made one.

    A body that was only a docstring becomes `pass`, so the code still parses to the same tree. None where the module
    cannot be parsed, holds next to nothing, or is mostly a table (characters, numbers).
    """
    source = _read_text(path)
    tree = _parse(source) if source is not None else None
    if source is None or tree is None:
        return None
    text, literals = _cut_comments("\n" + _cut_docstrings(source, tree))
    text = text.strip("\n") + "\n"
    digits = len(text) - len(re.sub(r"\d", "", text))
    signs = len("".join(text.split()))
    if signs < 150 or literals > 0.5 * signs or digits > 0.2 * signs:
        return None
    return text


def _cut_docstrings(source: str, tree: ast.Module) -> str:
    data = source.encode()
    starts = [0]
    for line in data.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    cuts: list[tuple[int, int, bytes]] = []
    for owner, statements in _statement_lists(tree):
        texts = [s for s in statements if _is_text(s)]
        for index, statement in enumerate(texts):
            needed = index == 0 and len(texts) == len(statements) and not isinstance(owner, ast.Module)
            assert statement.end_lineno is not None and statement.end_col_offset is not None  # ast.parse always sets them
            begin = starts[statement.lineno - 1] + statement.col_offset
            end = starts[statement.end_lineno - 1] + statement.end_col_offset
            alone = not data[starts[statement.lineno - 1] : begin].strip() and _REST_OF_LINE.match(data, end)
            if needed:
                cuts.append((begin, end, b"pass"))
            elif alone:
                cuts.append((starts[statement.lineno - 1], end + (data[end : end + 1] == b"\n"), b""))
    pieces, position = [], 0
    for begin, end, put in sorted(cuts):
        pieces += [data[position:begin], put]
        position = end
    return b"".join([*pieces, data[position:]]).decode()


def _cut_comments(source: str) -> tuple[str, int]:
    """Source without comments and with single blank lines, and the number of characters in its string literals."""
    literals = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal literals
        if match["string"]:
            literals += len(match[0])
            return match[0]
        # In a gap, a line with nothing on it is a blank line that was there; comment-only lines vanish.
        _, *lines = match[0].split("\n")
        return "\n" if any(not line.strip() for line in lines) else ""

    return _STRING_OR_GAP.sub(replace, source), literals


def read_prose(name: str, path: Path, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """(name, text) of the prose in a module: docstrings and blocks of comments in their order, paragraphs met before left out.

    `seen` remembers paragraphs between modules and is changed. Licence headers, marks for tools, and paragraphs that are
    mostly signs are dropped. One text a module; the reference topics of `pydoc` are one text a topic.
    """
    source = _read_text(path)
    if source is None:
        return
    if name == "pydoc_data.topics":
        for topic, text in _read_topics(source):
            yield f"{name}.{topic}", _join_new([text], seen)
        return
    text = _join_new([text for text in _prose_blocks(source) if not _LICENCE.search(text, 0, 1000)], seen)
    if len(text) >= 200:
        yield name, text


def _read_topics(source: str) -> list[tuple[str, str]]:
    for statement in ast.parse(source).body:
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Dict):
            topics = ast.literal_eval(value)
            return [(key, text) for key, text in topics.items() if isinstance(text, str)]
    return []


def _prose_blocks(source: str) -> list[str]:
    """Triple-quoted strings and runs of comments that have their lines to themselves, in their order.

    Such a string is nearly always a docstring; the tree is not asked, as parsing every package takes longer than the rest.
    """
    blocks: list[str] = []
    comments: list[str] = []
    last_end = -1
    for match in _STRING_OR_COMMENT.finditer(source):
        start, end = match.span()
        if source[source.rfind("\n", 0, start) + 1 : start].strip(" \trR"):
            continue
        is_comment = source[start] == "#"
        if not is_comment or source[last_end:start].strip(" \t") != "\n":
            blocks.append("\n".join(comments).strip())
            comments = []
        if is_comment:
            last_end = end
            comment = source[start:end].strip("#")
            if not _MARKS.match(comment.strip()):
                comments.append(comment.removeprefix(" ").rstrip())
        elif source[start : start + 3] in ('"""', "'''") and source[end : max(source.find("\n", end), end)].strip()[:1] in ("", "#"):
            blocks.append(_dedent(source[start + 3 : end - 3].removeprefix("\\\n")))
    blocks.append("\n".join(comments).strip())
    return [block for block in blocks if len(block) >= 40]


def _dedent(text: str) -> str:
    first, newline, rest = text.expandtabs().partition("\n")
    return (first.strip() + newline + textwrap.dedent(rest)).strip()


def _join_new(texts: list[str], seen: set[bytes]) -> str:
    """The paragraphs of the texts that were not seen before and read as language, joined by blank lines."""
    kept = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if sum(map(str.isalpha, words)) < 0.55 * len(words) or not words:
                continue
            if len(words) >= 40:
                key = hashlib.blake2b(words.encode(errors="replace"), digest_size=8).digest()
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept) + "\n" if kept else ""
