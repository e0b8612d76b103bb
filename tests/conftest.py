"""How every test runs: eight simulated CPU devices, strict ranks, checked shapes, and the reference data.

This file is loaded before any test imports jax, which reads these settings once.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

_DEVICE_FLAG = "--xla_force_host_platform_device_count"
# What a test run sets for itself and no command started by a test may inherit: users have one CPU device. Worker processes of a
# test run inherit what the first process has set, so that process also says what it found.
_USER_XLA_FLAGS = os.environ.setdefault("MOEJAX_TESTS_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))

if _DEVICE_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICE_FLAG}=8".strip()
# Tests marked gpu or tpu are run on such a machine with JAX_PLATFORMS naming it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Linux lets a process have 65,530 memory mappings, and each compiled program takes several; far below that they are let go.
_MANY_MAPPINGS = 20_000
_TESTS_RUN = itertools.count()
# Tokens that tests and the commands they start keep: never in the user's home, and gone with the test run.
_CACHE = tempfile.TemporaryDirectory(prefix="moejax-tests-", ignore_cleanup_errors=True)
os.environ["MOEJAX_CACHE"] = _CACHE.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Every annotated shape and dtype of these packages is checked at each call. Installed before a test module imports them.
_hook = install_import_hook(["moejax.ops", "moejax.model"], "beartype.beartype")


def golden(name: str) -> SimpleNamespace:
    """One case of the reference data: `directory`, `inputs`, `expected`, `gradients` (dicts of arrays), `meta` and `config`."""
    directory = GOLDEN / name
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no reference case {directory}; expected one of {sorted(p.name for p in GOLDEN.iterdir())}")
    return SimpleNamespace(
        directory=directory,
        inputs=_arrays(directory / "inputs.npz"),
        expected=_arrays(directory / "expected.npz"),
        gradients=_arrays(directory / "grads.npz"),
        meta=_json(directory / "meta.json"),
        config=_json(directory / "config.json"),
    )


# Flags of train.py for a short run on what `write_text` wrote to the folder "text"; steps, layers and lengths of rows are the caller's.
SHORT_RUN = [
    *("--model.vocab-size", "300", "--model.hidden-size", "32", "--model.intermediate-size", "32", "--model.num-experts", "4"),
    *("--model.max-length", "256", "--data.path", "text", "--data.max-megabytes", "0.1", "--train.eval-kilobytes", "1"),
    *("--train.optimizer", "adamw"),
]


def write_text(folder: Path) -> None:
    """Makes the folder and writes twelve small text files into it, always the same."""
    folder.mkdir()
    words, rng = "the a model reads writes token expert router layer weight small large sends to from with and".split(), random.Random(0)
    for number in range(12):
        lines = (" ".join(rng.choices(words, k=12)) for _ in range(40))
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")


def check_gradients(gradients: Any, reference: SimpleNamespace, config: Any) -> None:
    """Asserts that the gradients of all parameters are the reference case's: each tensor within 1e-4 of its largest entry or its norm."""
    import jax

    from moejax.checkpoint.names import export_tensors
    from moejax.families import get_family

    ours = {}
    for table in get_family(config.family).tables:
        ours |= dict(export_tensors(jax.tree.map(np.asarray, gradients)["params"], config, table))
    for name, expected in reference.gradients.items():
        kind, key = name.split(":")
        if kind == "grad":
            assert np.max(np.abs(ours[key] - expected)) < 1e-4 * np.max(np.abs(expected)), key
        else:
            assert np.linalg.norm(ours[key].astype(np.float64)) == pytest.approx(float(expected), rel=1e-4), key


def greedy_prompts(reference: SimpleNamespace) -> list[list[int]]:
    """The prompts of a reference case's greedy continuations: its rows without their padding."""
    lengths = reference.inputs["attention_mask"].sum(axis=1)
    return [row[:length].tolist() for row, length in zip(reference.inputs["input_ids"], lengths, strict=True)]


def run_command(
    args: Sequence[str | Path], cwd: str | Path = ROOT, timeout: float = 300.0, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a command as a user would, on one CPU device; `"python"` as the first word is this interpreter.

    stdout and stderr come back as text; the status is the caller's to check.
    """
    words = [str(word) for word in args]
    if words[0] == "python":
        words[0] = sys.executable
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "140", **environment}
    env.pop("JAX_NUMPY_RANK_PROMOTION", None)
    env["XLA_FLAGS"] = _USER_XLA_FLAGS
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(words, cwd=cwd, env=env, text=True, capture_output=True, timeout=timeout, check=False)


@pytest.fixture(scope="session", name="golden")
def golden_fixture():
    """The function `golden`, for tests that prefer an argument to an import."""
    return golden


@pytest.fixture(scope="session", name="run_command")
def run_command_fixture():
    """The function `run_command`, likewise."""
    return run_command


@pytest.fixture(autouse=True)
def _forget_programs():
    """Lets compiled programs go once they are many: a process without mappings left is killed by the compiler. Looked at now and then."""
    yield
    if next(_TESTS_RUN) % 10:
        return
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        import jax

        jax.clear_caches()


class Hopper(NamedTuple):
    """What kernels ask of the GPU they are lowered for; an H100."""

    id: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"
    core_count: int = 132


@pytest.fixture
def hopper(monkeypatch) -> Hopper:
    """A GPU to lower programs for: not there, and nothing runs on it."""
    from jax.extend import backend

    monkeypatch.setattr(backend, "get_default_device", Hopper)
    return Hopper()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
