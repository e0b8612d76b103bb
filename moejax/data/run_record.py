"""data.json in a run's directory: the entries of the cache that its rows come from.

A run that has taken steps has seen some rows and not others. It goes on with the same entries, whatever has become of the text;
where an entry is gone, one made again must be equal, or the run cannot go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moejax.config import DataConfig, Domain, UserError
from moejax.data.cache import Entry
from moejax.files import write_file

RECORD_FILE = "data.json"


class Begun(NamedTuple):
    """The entry that a run began with: where it lies, its key, its tokens, its checksum."""

    root: Path
    key: str
    tokens: int
    checksum: str


def has_steps(directory: Path) -> bool:
    """Whether the run of a directory has saved a step."""
    return any(path.name.isdigit() for path in (directory / "checkpoints").glob("*"))


def read_record(directory: Path) -> dict[str, Any]:
    """What `write_record` wrote, by domain; {} where there is none. Raises UserError for a broken one of a run that has taken steps."""
    path = directory / RECORD_FILE
    try:
        values = json.loads(path.read_text())
        return {name: dict(values["domains"][name]) for name in values["domains"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not has_steps(directory):
            return {}
        raise UserError(
            f"{str(path)!r} cannot be read ({error}), which says what text this run has seen; restore it, or start another run "
            "with --run-dir"
        ) from error


def begun_with(record: Mapping[str, Any], domain: Domain, settings: str, root: Path) -> Begun | None:
    """The domain's entry in a record, looked for in the cache `root` first and then where it was.

    None where the record has none, or one of other settings (another seed, another limit): that is not what is asked for.
    """
    values = record.get(domain.name)
    if values is None or values["settings"] != settings:
        return None
    place = root if (root / values["key"]).is_dir() else Path(values["cache"])
    return Begun(place, values["key"], values["tokens"], values["checksum"])


def require_same(domain: Domain, directory: Path, before: Begun | None, entry: Entry) -> None:
    """Raises UserError where an entry is not what the run of `directory` began with: its rows are no longer those it has seen."""
    if before is not None and before.checksum != entry.checksum:
        raise UserError(
            f"the tokens of data domain {domain.name!r} that the run in {str(directory)!r} has trained on are gone from "
            f"{str(before.root / before.key)!r}, or broken there, and the text now gives others ({entry.tokens:,} tokens; they were "
            f"{before.tokens:,}): which rows it has seen would no longer be known; restore that directory or the text, or start another "
            "run with --run-dir"
        )


def write_record(directory: Path, data: DataConfig, entries: Mapping[str, Entry], settings: Mapping[str, str]) -> None:
    """Writes data.json, whole or not at all, where it says something new. `settings`: a hash by domain, see `begun_with`."""
    domains = {
        domain.name: {
            "path": domain.path,
            "settings": settings[domain.name],
            "cache": str(entries[domain.name].directory.parent.resolve()),
            "key": entries[domain.name].key,
            "tokens": entries[domain.name].tokens,
            "checksum": entries[domain.name].checksum,
        }
        for domain in data.sources
    }
    path = directory / RECORD_FILE
    text = json.dumps({"domains": domains}, indent=2) + "\n"
    if path.is_file() and path.read_text(errors="replace") == text:
        return
    write_file(path, text)
