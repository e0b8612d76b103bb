"""Files that are whole or not there: written under a hidden name beside their own, then renamed. And what all who keep files ask of them.

For single files. A directory cannot replace another in one rename: checkpoints have `moejax.checkpoint.atomic`, which moves the older
one aside first, and a tokenizer kept in the cache is left alone where there is one already (`moejax.data.run_tokenizer`).
"""

import contextlib
import errno
import os
import zlib
from pathlib import Path

FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: a disk, a quota or a limit on files is reached
READ_BYTES = 1 << 22


def write_file(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Writes a file, text as UTF-8, so that nobody ever finds a part of it: on any error there is what was there before, and no more.

    The hidden name says which process writes, as several may write the same file of a cache. `sync` waits until the bytes are on the
    disk, for a file that says that others are whole: it must not outlive a power cut that they do not.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, the reason is the error above
            temporary.unlink(missing_ok=True)


def measure_file(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file, which is read once, with a few MiB of memory."""
    size, checksum, buffer = 0, 0, bytearray(READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(view[:count], checksum)
            size += count
    return size, checksum
