"""Checks of configuration fields: their types, their signs, their choices; and the error that every bad input becomes.

Standard library only.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Bad input, in one message: what, where, got, expected, what to do. Commands print it and exit with status 2."""


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending: what an error message offers instead of a size that does not divide."""
    return [d for d in range(1, number + 1) if number % d == 0]


_type_hints = functools.cache(get_type_hints)
_TYPE_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}


def require_types(section: str, config: Any) -> None:
    """Raises UserError for the first field whose value is not of its annotated type; a whole number is a number too."""
    for name, expected in _type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of_type(value, expected):
            where = f"{section}.{name}" if section else name
            raise UserError(
                f"{where}={value!r} is of type {type(value).__name__}; expected {_describe_type(expected)}; "
                f"correct it in the config file or set --{where.replace('_', '-')}"
            )


def _is_of_type(value: Any, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin is Literal:
        return isinstance(value, str)  # which one, `require_choice` says
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of_type(item, get_args(expected)[0]) for item in value)
    if origin is Mapping:
        key, item = get_args(expected)
        return isinstance(value, Mapping) and all(_is_of_type(k, key) and _is_of_type(v, item) for k, v in value.items())
    if origin in (Union, types.UnionType):
        return any(_is_of_type(value, option) for option in get_args(expected))
    if isinstance(value, bool):  # Python's bool is an int; a count that is True is a mistake
        return expected is bool
    if expected is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, expected)


def _describe_type(expected: Any) -> str:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"a tuple, each item {_describe_type(arguments[0])}"
    if origin is Mapping:
        return f"a dict from {_describe_type(arguments[0])} to {_describe_type(arguments[1])}"
    if arguments:
        return " or ".join(map(_describe_type, arguments))
    return _TYPE_NAMES.get(expected, f"a {expected.__name__}")


def require_positive(section: str, config: Any, *names: str) -> None:
    """Raises UserError for the first of these fields that is neither None nor above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{section}.{name}={value!r} must be greater than 0; set --{section}.{name.replace('_', '-')}")


def require_choice(section: str, config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises UserError where the field is none of the choices, naming the nearest."""
    value = getattr(config, name)
    if value not in choices:
        raise UserError(f"{section}.{name}={value!r} is unknown; expected one of {', '.join(choices)}{nearest(value, choices)}")


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of an error message that names the known name meant, where one is near: `; did you mean 'x'?`, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
