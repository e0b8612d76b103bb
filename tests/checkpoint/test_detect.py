"""What a path holds, and what is said of one that holds nothing."""

from __future__ import annotations

import pytest

from moejax.checkpoint.detect import detect, find_checkpoint, list_kinds
from moejax.checkpoint.store import save, step_directory
from moejax.config import UserError


def test_each_kind_is_seen(tmp_path, golden, small_config, random_tree):
    run = tmp_path / "run"
    for step in (1, 2):
        save(step_directory(run, step), random_tree(small_config), small_config, step=step)
    newest = step_directory(run, 2)
    assert detect(newest) == "moejax"
    assert detect(run) == "run"
    assert detect(str(golden("mixtral_hf").directory)) == "hf"
    assert find_checkpoint(run) == ("moejax", newest)
    assert find_checkpoint(newest) == ("moejax", newest)
    assert find_checkpoint(golden("mixtral_hf_sharded").directory)[0] == "hf"


def test_mistrals_layout_and_what_comes_first(tmp_path):
    for name in ("consolidated.safetensors", "consolidated.00.pth", "consolidated.00.pt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("x")
        (folder / "config.json").write_text("{}")  # as on the Hub, where both layouts lie together
        assert detect(folder) == "mistral"
        (folder / "model.safetensors").write_text("x")
        assert list_kinds(folder) == ["hf", "mistral"]
        assert detect(folder) == "hf"
        (folder / "checkpoints").mkdir()
        assert list_kinds(folder) == ["run", "hf", "mistral"]
        (folder / "moejax.json").write_text("{}")
        assert list_kinds(folder) == ["moejax", "run", "hf", "mistral"]
        assert detect(folder) == "moejax"


def test_paths_that_hold_nothing(tmp_path):
    (tmp_path / "my_run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_text("x")
    (tmp_path / "a.gguf").write_text("x")
    for name, message in (
        ("my_rum", f"my_rum does not exist; did you mean {tmp_path}/my_run"),
        ("elsewhere", f"does not exist; nothing in {tmp_path} has a similar name"),
        ("elsewhere/deep/path", f"of its path only {tmp_path} exists"),
        ("notes/todo.txt/x", f"of its path only {tmp_path}/notes/todo.txt \\(a file\\) exists"),
        ("notes", r"holds no checkpoint: looked for moejax.json .* found todo.txt"),
        ("notes/todo.txt", "is a file; expected a directory"),
        ("a.gguf", "is a GGUF checkpoint"),
        ("pickles", "PyTorch pickles"),
    ):
        with pytest.raises(UserError, match=message):
            detect(tmp_path / name)
    with pytest.raises(UserError, match="without a complete checkpoint"):
        find_checkpoint(tmp_path / "my_run")
