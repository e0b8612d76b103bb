"""Data sets of the Hugging Face Hub: `hf://datasets/OWNER/NAME[/PATTERN]`, listed and fetched through huggingface_hub, by no other file.

A file is fetched when it is its turn to be read, into the cache that every program of Hugging Face shares.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any, NamedTuple

from moejax.config import UserError

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:/(.+))?")


class HubFile(NamedTuple):
    """A file of a data set: its path there, its bytes, and the hash of its content."""

    name: str
    size: int
    content: str


def list_hub_files(address: str) -> tuple[str, str, list[HubFile]]:
    """(repository, commit, files that the pattern of the address names; without a pattern, all).

    A pattern is one of file names with `*`, a file or a folder. Raises UserError for an address that is none, for a data set that is
    not there or may not be read, and where the Hub cannot be reached.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"data path {address!r} is no data set of the Hub; expected hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/PATTERN"
        )
    repository, pattern = match[1], match[2]
    try:
        info = _api().dataset_info(repository, files_metadata=True)
    except Exception as error:
        raise _explain(address, error) from error
    files = [HubFile(file.rfilename, file.size or 0, file.blob_id or "") for file in info.siblings or []]
    if pattern is not None:
        folder = pattern.rstrip("/") + "/"
        files = [file for file in files if fnmatch.fnmatchcase(file.name, pattern) or file.name.startswith(folder)]
        if not files:
            raise UserError(
                f"data path {address!r}: no file of the data set {repository} matches {pattern!r}; look at its files on the Hub"
            )
    return repository, str(info.sha), files


def fetch_hub_file(repository: str, commit: str, name: str) -> Path:
    """Where a file of a data set lies, fetched unless it was before. Raises UserError where it cannot be."""
    try:
        return Path(_api().hf_hub_download(repository, name, repo_type="dataset", revision=commit))
    except Exception as error:
        raise _explain(f"hf://datasets/{repository}/{name}", error) from error


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


def _explain(address: str, error: Exception) -> UserError:
    from huggingface_hub import errors

    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{address} is gated: accept its conditions on the Hub first, then log in with `hf auth login`, or set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return UserError(
            f"{address} is no data set of the Hub that may be read; check the name, or log in with `hf auth login` where it is private"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return UserError(f"{address} cannot be kept in {error.filename!r}: {error.strerror}; make room, or set HF_HOME to another place")
    return UserError(
        f"{address} cannot be fetched, the Hub does not answer ({reason}); connect to the network, or give "
        "data.domains a path to files that are here"
    )
