"""The directory of a run: config.json, tokenizer, metrics.jsonl, starts.jsonl, checkpoints/.

One directory holds one run, and one process trains it.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moejax.config import RunConfig, UserError, to_json
from moejax.files import write_file

# Fields of the model that change how it is computed, not what it is: a run may go on with others.
HOW_NOT_WHAT = {"dispatch", "dtype", "remat"}
# Where and how its tokens are kept and made, not which they are.
WHERE_NOT_WHAT = {"cache_dir", "workers"}
# What a run has that got as far as having text; from then on it can only be gone on with as it is.
LEFT_BY_A_RUN = ("tokenizer.model", "tokenizer.json", "checkpoints")
LOCK = ".lock"
_held: set[TextIO] = set()


@contextlib.contextmanager
def hold_run_directory(config: RunConfig, log: Callable[[str], None] = print) -> Iterator[None]:
    """Makes the run's directory, and keeps other processes from training in it; their end, whatever it is, lets it go.

    Raises UserError, naming process and machine, where another one holds it. A file system without locks is said so, and trusted.
    """
    directory = Path(config.directory)
    with contextlib.ExitStack() as opened:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((directory / LOCK).open("a+"))
        except OSError as error:
            raise _cannot_write(directory, error) from error
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_name_holder(directory, file)) from None
        except (ImportError, OSError) as error:
            log(f"{directory} cannot be locked ({error}): see to it that no other process trains in it")
        else:
            file.truncate(0)
            file.write(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}) + "\n")
            file.flush()
        _held.add(file)
        opened.callback(_held.discard, file)
        yield


def _name_holder(directory: Path, file: TextIO) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        who = f"process {holder['process']} on {holder['machine']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"{directory} is in use: {who} is training there; wait for its end, stop it, or choose another directory with --run-dir"


def _let_go_in_child() -> None:
    """A forked process must not hold on to the run that its parent has lost."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def claim_run_directory(config: RunConfig) -> Path:
    """Makes the run's directory and writes its config.json, or checks that the run found there is this one.

    A run may go on with other train, mesh and sample settings. Raises UserError, naming the fields, where the model or the data
    differ: its weights would not fit, or its rows would not be the ones it has not seen yet. One that came to nothing (no text
    found, say) keeps neither tokenizer nor weights, and is no obstacle.
    """
    directory = Path(config.directory)
    path = directory / "config.json"
    values = to_json(config)
    if path.exists():
        before = _read_config(path)
        if any((directory / name).exists() for name in LEFT_BY_A_RUN):
            _refuse_other_run(directory, before, values)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    return directory


def require_shared(directory: Path) -> None:
    """Raises UserError where the first of several processes has made the run's directory and this one does not see it."""
    if not (directory / "config.json").exists():
        raise UserError(
            f"the run directory {directory} that process 0 has made is not to be seen here; name one on a file system that all hosts share "
            "with --run-dir"
        )


def _cannot_write(directory: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the run directory {directory}: {error.strerror}; choose another with --run-dir")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fix its permissions, or train elsewhere with --run-dir") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or train elsewhere with --run-dir") from error
    if not isinstance(values, dict) or not all(isinstance(values.get(section), dict) for section in ("model", "data")):
        raise UserError(
            f"{path} is not the config of a run: it lacks the sections model and data (a published model's directory has a config.json "
            "too); train elsewhere with --run-dir"
        )
    return values


def _refuse_other_run(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = []
    for section, ignored in (("model", HOW_NOT_WHAT), ("data", WHERE_NOT_WHAT)):
        for name, value in now[section].items():
            old = before[section].get(name, value)  # a field newer than the run
            if name not in ignored and old != value:
                differences.append(f"{section}.{name} was {old!r} and is now {value!r}")
    if differences:
        raise UserError(
            f"{directory} holds a run of a different model or data: {'; '.join(differences)}. Choose another directory with --run-dir, "
            "set the fields back, or remove it to start over"
        )
