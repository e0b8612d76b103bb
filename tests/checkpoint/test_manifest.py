"""Every file of a checkpoint is as it was written, or the one that is not is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.manifest import MANIFEST, METADATA, list_files, sum_bytes, sum_file, write_manifest
from moejax.checkpoint.store import read_metadata, restore_optimizer, restore_params, save, verify
from moejax.config import UserError


@pytest.fixture
def checkpoint(tmp_path, small_config, random_tree) -> Path:
    tree = random_tree(small_config)
    extra = lambda path: (path / "tokenizer.model").write_bytes(b"pieces" * 100)  # noqa: E731
    run = {"checksum": "01234567", "note": '"checksum": "89abcdef"'}  # what a checkpoint says must not be taken for its checksum
    save(tmp_path / "a", tree, small_config, optimizer={"m": tree["embed"]}, write_extra=extra, run=run)
    return tmp_path / "a"


def test_what_was_written_passes(checkpoint):
    verify(checkpoint)
    assert read_metadata(checkpoint).run["checksum"] == "01234567"


def test_twenty_flipped_bits_are_each_found(checkpoint):
    """Of every file in turn, moejax.json and the manifest among them, some bit."""
    generator = np.random.default_rng(0)
    files = list_files(checkpoint)
    always = [MANIFEST, METADATA, "tokenizer.model", "params/_METADATA"]
    flipped = always + [str(name) for name in generator.choice(files, 20 + len(always))]
    for name in flipped:
        path = checkpoint / name
        whole = path.read_bytes()
        bit = int(generator.integers(8 * len(whole)))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            verify(checkpoint)
        path.write_bytes(whole)
    verify(checkpoint)


def test_every_bit_of_the_metadata_counts(checkpoint):
    path = checkpoint / METADATA
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=METADATA):
            read_metadata(checkpoint)


def test_missing_extra_and_truncated_files_are_named(checkpoint, small_config):
    victim = next(path for path in (checkpoint / "params").rglob("*") if path.is_file() and path.stat().st_size > 10)
    whole = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim.name} is missing"):
        restore_params(checkpoint, small_config)
    victim.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{victim.name} is truncated: it holds"):
        restore_params(checkpoint, small_config)
    victim.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=f"{victim.name} is damaged: it holds"):
        restore_params(checkpoint, small_config)
    victim.write_bytes(whole)
    (checkpoint / "params" / "stray").write_text("x")
    with pytest.raises(UserError, match="stray is not in the checkpoint's manifest"):
        restore_params(checkpoint, small_config)
    (checkpoint / "params" / "stray").unlink()
    (checkpoint / ".DS_Store").write_text("x")  # of a file manager, and of no concern
    restore_params(checkpoint, small_config)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(UserError, match=f"{MANIFEST} is missing"):
        restore_params(checkpoint, small_config)


def test_reading_one_folder_checks_that_folder(checkpoint, small_config, random_tree):
    """The optimiser's files are not read to restore the parameters, but they must be there."""
    victim = max((path for path in (checkpoint / "optimizer").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    restore_params(checkpoint, small_config)
    with pytest.raises(UserError, match=victim.name):
        restore_optimizer(checkpoint, {"m": random_tree(small_config)["embed"]})
    shutil.rmtree(checkpoint / "optimizer")
    with pytest.raises(UserError, match="missing"):
        restore_params(checkpoint, small_config)


def test_sums_of_written_and_read_files_agree(tmp_path):
    data = np.random.default_rng(0).bytes(9_000_001)  # more than is read at once
    (tmp_path / "a").write_bytes(data)
    assert sum_file(tmp_path / "a") == sum_bytes(data) == sum_bytes(np.frombuffer(data, np.uint8))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_bytes(b"")
    write_manifest(tmp_path, {})
    first = (tmp_path / MANIFEST).read_bytes()
    write_manifest(tmp_path, {}, {"a": sum_bytes(data)})
    assert (tmp_path / MANIFEST).read_bytes() == first
    assert list_files(tmp_path) == ["a", "folder/.hidden", MANIFEST, METADATA]
