"""What a command sets up before jax starts: large pages for its memory, and a folder for the programs it compiles.

Standard library only. Nothing here changes a result; MOEJAX_LARGE_PAGES=0 and JAX_ENABLE_COMPILATION_CACHE=0 leave each out.
"""

import os
import platform
import sys
from pathlib import Path

_PAGES = "glibc.malloc.hugetlb"
MAX_COMPILED_BYTES = 4 << 30


def prepare_process() -> None:
    """Called first thing where a program starts that computes. May start the same command anew in this process, once."""
    use_large_pages()
    keep_compiled_programs()


def user_cache() -> Path:
    """What may be kept between runs and made again: $MOEJAX_CACHE, else ~/.cache/moejax."""
    return Path(os.environ.get("MOEJAX_CACHE") or "~/.cache/moejax").expanduser()


def keep_compiled_programs() -> None:
    """Has jax keep what it compiled, so that the next start of the same program does not compile it again.

    In `compiled/` of `user_cache()` unless JAX_COMPILATION_CACHE_DIR names another place; what was not used for longest goes first
    where it grows past MAX_COMPILED_BYTES. jax reads these variables when it is imported.
    """
    folder = user_cache() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # nowhere to keep anything: compile each time
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_COMPILED_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def use_large_pages() -> None:
    """Has the C library ask for pages of 2 MB: the large temporaries of a step on CPU are otherwise taken page by page of 4 kB each time.

    glibc reads its tunables only where a process begins, so the command begins again: same process, same arguments.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or _PAGES in tunables or os.environ.get("MOEJAX_LARGE_PAGES") == "0":
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_PAGES}=1"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
