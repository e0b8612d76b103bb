"""The command: what it prints, its statuses, and that an error leaves nothing."""

from __future__ import annotations

import pytest

from moejax.checkpoint.store import verify

COMMAND = ["python", "-m", "moejax.checkpoint.convert"]
SMALL_FILES = """
import resource, sys
from moejax.checkpoint.convert import main
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
main()
"""


def test_converting_and_again(tmp_path, golden, run_command):
    result = run_command([*COMMAND, golden("mixtral_hf").directory, tmp_path / "a", "--verify"])
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("reads   ", "Hugging Face safetensors", "copied", "compared all ", "is complete; read it with moejax.load"):
        assert part in result.stdout
    verify(tmp_path / "a")
    result = run_command([*COMMAND, golden("mixtral_hf").directory, tmp_path / "a"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'a'} exists already; give another path, or remove it first\n"


def test_a_full_disk_is_one_message(tmp_path, golden, run_command):
    """Files may not grow beyond a limit: what the writer meets is what a full disk or a quota does to it."""
    result = run_command(["python", "-c", SMALL_FILES, golden("mixtral_hf").directory, tmp_path / "a"])
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: no room to save {tmp_path / 'a'}: it needs ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: a source and a destination are needed: moejax-convert SOURCE DESTINATION"),
        (["--dryrun"], "error: unknown flag --dryrun; the nearest is --dry-run"),
    ],
)
def test_wrong_arguments_are_answered_without_jax(run_command, arguments, message):
    code = "import sys; sys.modules['jax'] = None; from moejax.checkpoint.convert import main; main()"
    result = run_command(["python", "-c", code, *arguments])
    assert result.returncode == 2
    assert result.stderr.startswith(message)
