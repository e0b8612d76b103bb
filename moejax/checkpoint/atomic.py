"""Writes a directory so that it is either complete or not there: under a hidden name beside it, then renamed into place.

What a killed process leaves behind is named after the process, and removed by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from moejax.config import UserError
from moejax.files import FULL_DISK_ERRORS


@contextlib.contextmanager
def write_directory(directory: Path, needed: int) -> Iterator[Path]:
    """Yields an empty directory to fill; on leaving, it is synced to the disk and becomes `directory`, replacing an older one.

    `needed` is the number of bytes that will be written. On any error what was written is removed and `directory` is as it was;
    a disk or quota that is full, before or while writing, is a UserError, and so is a place that cannot be written to.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory.parent)
        free = shutil.disk_usage(directory.parent).free
        if needed > free:
            raise full_disk_error(directory, needed, free)
        temporary = _beside(directory, "tmp")
        _remove(temporary)  # of a process that had this one's number before
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot save {directory}: {error}; save elsewhere") from error
    try:
        yield temporary
        sync_directory(temporary)
        move_into_place(temporary, directory)
    except BaseException as error:
        _remove(temporary)
        if is_full_disk(error):
            raise full_disk_error(directory, needed, shutil.disk_usage(directory.parent).free) from error
        raise


def remove_directory(directory: Path) -> None:
    """Removes `directory`, which is renamed first, so that it is never seen half removed."""
    doomed = _beside(directory, "doomed")
    directory.rename(doomed)
    _remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Clears `folder` of what processes of this machine that no longer run left half written, replaced or removed there."""
    for path in folder.glob(".*"):
        match = re.fullmatch(rf"\.(.+)\.(tmp|old|doomed)-{re.escape(socket.gethostname())}-(\d+)", path.name)
        if not match or _is_running(int(match[3])):
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            path.rename(folder / match[1])  # killed between the two renames of a replacement
        else:
            _remove(path)


def _beside(directory: Path, purpose: str) -> Path:
    """A hidden name beside `directory` that says which process made it."""
    return directory.with_name(f".{directory.name}.{purpose}-{socket.gethostname()}-{os.getpid()}")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    """Removes a directory; tries again for a moment, as Orbax may still be writing into one whose save has failed."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)


def sync_directory(directory: Path) -> None:
    """Makes sure that files and directory entries are on the disk. Orbax does so for the arrays."""
    for folder, _, names in os.walk(directory):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def move_into_place(temporary: Path, directory: Path) -> None:
    """Renames `temporary` to `directory`. An older checkpoint there is moved aside first, and back if that fails."""
    if directory.exists():
        old = _beside(directory, "old")
        directory.rename(old)
        try:
            temporary.rename(directory)
        except BaseException:
            old.rename(directory)
            raise
        _remove(old)
    else:
        temporary.rename(directory)
    handle = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error says that a disk or a quota is full: as OSError, or as the text that tensorstore makes of one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS:
            return True
        if any(f"[os_error_code='{code}'" in str(error) for code in FULL_DISK_ERRORS):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk_error(directory: Path, needed: int, free: int) -> UserError:
    """What to tell the user when `directory`, which takes `needed` bytes, does not fit where `free` are free."""
    return UserError(
        f"no room to save {directory}: it needs {needed:,} bytes, {free:,} are free there (or a quota is full); nothing was left "
        "behind and earlier checkpoints are unchanged; make room or save elsewhere"
    )
