"""Typed access to the values of a published config file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.config import UserError


class ConfigReader:
    """Typed access to the values of a config.json; an absent key takes the default of the reference's configuration class.

    Every getter raises UserError, naming file and field, for a value of the wrong type.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None) -> int:
        """A whole number; null and absent take `default`."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, value, "a whole number")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number, or None where it is null or absent."""
        return None if self.values.get(name) is None else self.integer(name, None)

    def number(self, name: str, default: float) -> float:
        """A number, as a float; null and absent take `default`."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, value, "a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false; null and absent take `default`."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def require(self, name: str, accepted: tuple[Any, ...], reason: str) -> None:
        """Refuses any value of `name` but the accepted ones; null and absent are accepted."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            shown = " or ".join(repr(choice) for choice in accepted) or "null"
            raise self.error(name, value, f"{shown}: {reason}")

    def error(self, name: str, value: Any, expected: str) -> UserError:
        """The error for one field."""
        return UserError(f"{self.where}: {name} is {value!r}; expected {expected}")
