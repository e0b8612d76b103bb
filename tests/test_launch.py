"""What a command sets up before jax starts."""

import json
import os
import subprocess
import sys

import pytest

from moejax import launch
from tests.conftest import ROOT

PROGRAM = """
import json, os, sys
from moejax.launch import prepare_process
before = os.getpid()
prepare_process()
import jax
print(json.dumps([os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], jax.config.jax_compilation_cache_dir, os.getpid()]))
"""


def run(tmp_path, *words, **environment):
    (tmp_path / "program.py").write_text(PROGRAM)
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES" and not name.startswith("JAX_COMPILATION")}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", *words],
        env=clean | {"PYTHONPATH": str(ROOT), "MOEJAX_CACHE": str(tmp_path / "cache")} | environment,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return process.pid, json.loads(out)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for through glibc")
def test_a_command_begins_again_with_large_pages_as_the_same_process_and_with_the_same_arguments(tmp_path):
    pid, (tunables, words, compiled, own_pid) = run(tmp_path, "--a", "b c", GLIBC_TUNABLES="glibc.malloc.check=0")
    assert tunables == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert words == ["--a", "b c"]
    assert compiled == str(tmp_path / "cache" / "compiled")
    assert own_pid == pid


@pytest.mark.parametrize("environment", [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"MOEJAX_LARGE_PAGES": "0"}])
def test_who_decided_about_pages_is_left_alone(monkeypatch, environment):
    for name in ("GLIBC_TUNABLES", "MOEJAX_LARGE_PAGES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("began again"))
    launch.use_large_pages()
    assert os.environ.get("GLIBC_TUNABLES") == environment.get("GLIBC_TUNABLES")


def test_the_folder_for_compiled_programs(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what is set below
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "file"))
    launch.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    launch.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    launch.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
