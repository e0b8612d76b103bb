"""The model families moejax knows, by name: one file each, one line here."""

from __future__ import annotations

import difflib

from moejax.config import UserError
from moejax.families.arctic import ARCTIC
from moejax.families.family import Family
from moejax.families.mixtral import MIXTRAL

FAMILIES: dict[str, Family] = {family.name: family for family in (MIXTRAL, ARCTIC)}


def get_family(name: str) -> Family:
    """The family called `name`. Raises UserError, naming the nearest, where there is none."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.family={name!r} is unknown; expected one of {', '.join(FAMILIES)}{hint}")
    return FAMILIES[name]
