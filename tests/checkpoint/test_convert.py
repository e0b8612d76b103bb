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


@pytest.mark.slow
def test_there_and_back(tmp_path, golden, run_command):
    """An adapter merged, written for others, and read again: the same bytes."""
    base, adapter = (golden("mixtral_hf").directory.parent / name for name in ("lora_float64/base", "lora_float64/experts"))
    ours = run_command([*COMMAND, base, tmp_path / "a", "--dtype", "float32", "--merge-lora", adapter, "--lora-scaling", "0.5", "--verify"])
    assert (ours.returncode, ours.stderr) == (0, "")
    assert "merges  PEFT adapter" in ours.stdout
    theirs = run_command([*COMMAND, "--to", "hf", tmp_path / "a", tmp_path / "b", "--max-shard-size", "20KB"])
    assert (theirs.returncode, theirs.stderr) == (0, "")
    assert "is complete" in theirs.stdout
    assert "model-00001-of-0000" in theirs.stdout
    back = run_command([*COMMAND, tmp_path / "b", tmp_path / "c"])
    assert (back.returncode, back.stderr) == (0, "")
    files = [{path.relative_to(root): path.read_bytes() for path in (root / "params").rglob("*") if path.is_file()} for root in
             (tmp_path / "a", tmp_path / "c")]  # fmt: skip
    assert files[0] == files[1]
    mistral = run_command([*COMMAND, "--to", "mistral", tmp_path / "a", tmp_path / "d"])
    assert (mistral.returncode, mistral.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["consolidated.safetensors", "params.json"]
    damaged = next(path for path in (tmp_path / "a" / "params").rglob("*") if path.is_file() and path.stat().st_size > 1000)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    refused = run_command([*COMMAND, "--to", "hf", tmp_path / "a", tmp_path / "e"])
    assert refused.returncode == 2
    assert damaged.name in refused.stderr
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: a source and a destination are needed: moejax-convert SOURCE DESTINATION"),
        (["--dryrun"], "error: unknown flag --dryrun; the nearest is --dry-run"),
        (["a", "b", "--to", "gguf"], "error: --to gguf: expected hf or mistral; use: moejax-convert"),
        (["a", "b", "--to", "hf", "--dtype", "float32", "--verify"], "error: --dtype, --verify is not for --to; use: moejax-convert"),
        (["a", "b", "--max-shard-size", "1GB"], "error: --max-shard-size is for --to hf; use: moejax-convert"),
        (["a", "b", "--lora-scaling", "1"], "error: --lora-scaling needs --merge-lora DIR"),
    ],
)
def test_wrong_arguments_are_answered_without_jax(run_command, arguments, message):
    code = "import sys; sys.modules['jax'] = None; from moejax.checkpoint.convert import main; main()"
    result = run_command(["python", "-c", code, *arguments])
    assert result.returncode == 2
    assert result.stderr.startswith(message)
