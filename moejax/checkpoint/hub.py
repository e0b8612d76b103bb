"""Fetches models from the Hugging Face Hub: the files that are needed and no others, with progress, going on where a download stopped.

They lie in the cache that every program of Hugging Face shares. What exists as a path is never looked for on the Hub.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.checkpoint.atomic import is_full_disk
from moejax.checkpoint.mistral_files import CONSOLIDATED, PARAMS
from moejax.checkpoint.source import EXTRA_FILES
from moejax.checkpoint.torch_files import INDEX, SINGLE
from moejax.config import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Say = Callable[[str], None]


class Unreachable(UserError):
    """The Hub does not answer."""

    def __init__(self, identity: str, reason: str) -> None:
        super().__init__(
            f"{identity} is no directory here, and the Hub cannot be reached to fetch it ({reason}); give the directory of a model, or "
            "connect to the network"
        )
        self.reason = reason


def is_id(name: str | Path) -> bool:
    """Whether `name` is to be looked for on the Hub: "organisation/model", and neither a path nor within a folder that is there."""
    text = str(name)
    return _ID.fullmatch(text) is not None and not Path(text).exists() and not Path(text).parent.exists()


def locate(name: str | Path, revision: str | None = None, say: Say = lambda text: None) -> tuple[Path, str | None]:
    """The directory of a model, and what the Hub calls it: `name` itself and None for a path, else where its files were fetched to.

    `revision` is a branch, a tag or a commit of the Hub; None is its main branch. Without a network the files of an earlier download
    are used, and `say` told so. Raises UserError for a model that cannot be fetched, and for a revision of what is no model's id.
    """
    if not is_id(name):
        if revision is not None:
            raise UserError(
                f"revision={revision!r} is given, but {name} is a path; only models of the Hub (organisation/model) have revisions"
            )
        return Path(name).expanduser(), None
    identity = str(name)
    try:
        files = list_files(identity, revision)
        say(f"fetches {identity}: {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB, as far as they are not there from before")
        directory = _download(identity, revision, files)
    except Unreachable as error:
        directory = _find_download(identity, revision)
        if directory is None:
            raise
        say(f"the Hub cannot be reached; {identity} is read as it was fetched before: {directory} ({error.reason})")
    return directory, f"{identity}@{directory.name}"


def list_files(identity: str, revision: str | None = None) -> dict[str, int]:
    """The files of a model that are needed, and their bytes (0 where the Hub does not say).

    Raises Unreachable where it does not answer, UserError where there is no such model or revision, where it is closed to the user,
    and where it has no safetensors.
    """
    hub = _import_hub()
    try:
        info = hub.HfApi(endpoint=_endpoint()).model_info(identity, revision=revision, files_metadata=True)
    except Exception as error:
        raise _explain(identity, revision, error) from error
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    return {file: sizes[file] for file in choose_files(identity, list(sizes))}


def choose_files(identity: str, names: list[str]) -> list[str]:
    """Those of a model's files that are needed: the first layout of safetensors in the order of reading, and what is beside it."""
    here = [name for name in names if "/" not in name]
    if INDEX in here or SINGLE in here:
        weights = [name for name in here if name.endswith(".safetensors") and not name.startswith("consolidated")]
    elif CONSOLIDATED in here:
        weights = [CONSOLIDATED]
    else:
        found = ", ".join(sorted(name for name in here if not name.startswith("."))[:5]) or "nothing"
        raise UserError(
            f"{identity} has no safetensors ({INDEX}, {SINGLE} or {CONSOLIDATED}); found {found}; only safetensors are fetched from the "
            "Hub, download pickles of Mistral yourself and give their directory"
        )
    patterns = ("config.json", INDEX, PARAMS, *EXTRA_FILES)
    return sorted({*weights, *(name for name in here if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))})


def _download(identity: str, revision: str | None, files: dict[str, int]) -> Path:
    """Fetches those of `files` that the cache does not have."""
    hub = _import_hub()
    try:
        return Path(hub.snapshot_download(identity, revision=revision, allow_patterns=list(files), endpoint=_endpoint()))
    except Exception as error:
        if is_full_disk(error):
            raise UserError(
                f"{identity} does not fit the disk of the cache ({error}); make room, or set HF_HOME to another place"
            ) from error
        raise _explain(identity, revision, error) from error


def _find_download(identity: str, revision: str | None) -> Path | None:
    """What an earlier download left, if anything. Whether it is whole is for its reader to say."""
    hub = _import_hub()
    try:
        return Path(hub.snapshot_download(identity, revision=revision, allow_patterns=[], local_files_only=True))
    except OSError:
        return None


def _explain(identity: str, revision: str | None, error: Exception) -> UserError:
    """What the Hub's answer, or its silence, means for the user."""
    from huggingface_hub import utils

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, utils.GatedRepoError):
        return UserError(
            f"{identity} is gated: its conditions must be accepted first, at {_endpoint() or 'https://huggingface.co'}/{identity}; "
            "then log in with `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return UserError(f"{identity} has no revision {revision!r} on the Hub; give a branch, a tag or a commit of it")
    if isinstance(error, utils.RepositoryNotFoundError) or status in (401, 403):
        return UserError(
            f"{identity} is neither a directory here nor a model on the Hub that may be read; check the name, or log in with "
            "`hf auth login` where it is private"
        )
    if status is not None and status < 500:
        return UserError(f"{identity} cannot be fetched from the Hub, which answers {status} ({_first_line(error)}); try again later")
    return Unreachable(identity, _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _import_hub() -> Any:
    import huggingface_hub

    return huggingface_hub
