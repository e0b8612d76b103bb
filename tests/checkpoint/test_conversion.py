"""A conversion is exact, appears whole, goes on after a kill, and says in one message why it cannot be done."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import moejax
from moejax.checkpoint import conversion, stream, transfer
from moejax.checkpoint.conversion import convert
from moejax.checkpoint.lora import merge_lora
from moejax.checkpoint.manifest import list_files
from moejax.checkpoint.store import read_metadata, restore_params, verify
from moejax.checkpoint.torch_files import read_parameters
from moejax.config import UserError

CASES = [
    *((case, "") for case in (
        "mixtral_hf", "mixtral_hf_sharded", "mixtral_hf_sliding_window", "mixtral_original_safetensors", "arctic_sinkcache",
        "arctic_parallel", "arctic_interleaved", "arctic_top1", "arctic_parallel_mixed", "arctic_sliding_window",
    )),
    pytest.param("mixtral_original", "", marks=pytest.mark.torch),
    pytest.param("mixtral_original_release8", "release8", marks=pytest.mark.torch),
]  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch):
    """Arrays are cut, and memory is kept or not, as for large models."""
    monkeypatch.setattr(stream, "LARGEST_CHUNK", 20_000)
    monkeypatch.setattr(transfer, "KEPT_BYTES", 30_000)


@pytest.fixture
def source(tmp_path, golden) -> Path:
    """A writable copy of a sharded reference checkpoint, with files to carry along."""
    directory = tmp_path / "source"
    shutil.copytree(golden("mixtral_hf_sharded").directory, directory)
    (directory / "tokenizer_config.json").write_text('{"chat_template": "[INST]"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    return directory


def read_files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in list_files(directory)}


def edit_tensor(directory: Path, edit) -> str:
    """Passes the tensors of the first shard to `edit`; returns the shard's name."""
    shard = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)
    return shard.name


@pytest.mark.parametrize(("case", "folder"), CASES)
def test_every_reference_checkpoint_bit_by_bit(tmp_path, small_chunks, golden, assert_equal_trees, case, folder):
    """What is loaded from the checkpoint is what is loaded from its source: the same model, every weight the same."""
    directory = golden(case).directory / folder
    if any(directory.glob("*.pt*")):
        pytest.importorskip("torch", reason="the torch extra is not installed")
    convert(directory, tmp_path / "a", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    model, variables, _ = moejax.load(tmp_path / "a")
    expected, theirs, _ = moejax.load(directory)
    assert model.config == expected.config
    assert_equal_trees(theirs["params"], variables["params"])
    if (golden(case).directory / "hf").is_dir():  # the same weights as Hugging Face has them
        convert(golden(case).directory / "hf", tmp_path / "b")
        assert_equal_trees(restore_params(tmp_path / "b", model.config), variables["params"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("lora_float64/base", "lora_float64/rslora_router"),
        ("lora_float64/base", "lora_float64/converted"),
        ("mixtral_hf", "mixtral_peft_lora"),
        ("mixtral_original_safetensors", "mixtral_original_safetensors"),
    ],
)
def test_an_adapter_is_merged_as_into_the_tree(tmp_path, small_chunks, golden, assert_equal_trees, base, adapter, dtype):
    root = golden("mixtral_hf").directory.parent
    convert(root / base, tmp_path / "base", dtype)
    convert(tmp_path_source(tmp_path, root / base, dtype), tmp_path / "a", merge_lora=root / adapter, lora_scaling=0.7, verify=True)
    config = read_metadata(tmp_path / "a").config
    before, after = restore_params(tmp_path / "base", config), restore_params(tmp_path / "a", config)
    assert_equal_trees(merge_lora(before, config, root / adapter, 0.7), after)
    assert not np.array_equal(before["layers"]["block_0"]["moe"]["down"]["kernel"], after["layers"]["block_0"]["moe"]["down"]["kernel"])
    source = read_metadata(tmp_path / "a").source
    names = [entry["name"] for entry in source["files"]]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("adapter/")]
    assert "scale 0.7" in source["merged"]


def tmp_path_source(tmp_path: Path, directory: Path, dtype: str) -> Path:
    """The model in `directory` as published in `dtype`, so that merging and rounding meet the same numbers either way."""
    shutil.copytree(directory, tmp_path / "published")
    for file in (tmp_path / "published").glob("[cm]o*.safetensors"):
        save_file({key: value.astype(jax.numpy.dtype(dtype)) for key, value in load_file(file).items()}, file)
    return tmp_path / "published"


def test_a_sum_with_an_adapter_is_rounded_once(tmp_path, golden, assert_equal_trees):
    """float32 weights into bfloat16: not rounded before the adapter is added."""
    root = golden("lora_float64").directory
    convert(root / "base", tmp_path / "exact", "float32", merge_lora=root / "converted")
    convert(root / "base", tmp_path / "a", "bfloat16", merge_lora=root / "converted")
    exact = restore_params(tmp_path / "exact", read_metadata(tmp_path / "exact").config)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jax.numpy.bfloat16), exact)
    assert_equal_trees(rounded, restore_params(tmp_path / "a", read_metadata(tmp_path / "a").config))


def test_an_adapter_of_another_model_changes_nothing(tmp_path, golden):
    for adapter, options, message in (
        ("lora_float64/attn", {}, "it is an adapter of another model"),
        ("mixtral_hf", {}, "holds no adapter"),
        ("none", {}, "none does not exist"),
        (None, {"lora_scaling": 2.0}, "without an adapter"),
    ):
        directory = None if adapter is None else golden("mixtral_hf").directory.parent / adapter
        with pytest.raises(UserError, match=message):
            convert(golden("mixtral_hf").directory, tmp_path / "a", merge_lora=directory, **options)
    assert list(tmp_path.iterdir()) == []


def test_straight_into_the_shardings_of_eight_devices(tmp_path, small_chunks, source, assert_equal_trees):
    convert(source, tmp_path / "a")
    config = read_metadata(tmp_path / "a").config
    mesh = jax.make_mesh((4, 2), ("e", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tree = read_parameters(source, config)

    def split(leaf):
        return NamedSharding(mesh, PartitionSpec(None, "e", None, "x") if leaf.ndim == 4 else PartitionSpec(*[None] * (leaf.ndim - 1), "x"))

    shardings = jax.tree.map(split, tree)
    restored = restore_params(tmp_path / "a", config, sharding=shardings)
    assert_equal_trees(tree, restored)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings


def test_it_carries_all_that_belongs_to_the_model(tmp_path, source):
    assert moejax.convert(source, tmp_path / "a") == tmp_path / "a"
    metadata = read_metadata(tmp_path / "a")
    assert metadata.config.eos_token_ids == (2, 4)
    assert metadata.source["name"] == "source"
    described = {entry["name"]: entry for entry in metadata.source["files"]}
    assert described.keys() == {"config.json", "model.safetensors.index.json", *(path.name for path in source.glob("*.safetensors"))}
    first = sorted(source.glob("*.safetensors"))[0]
    digest = subprocess.run(["sha256sum", first], capture_output=True, text=True, check=True).stdout.split()[0]
    assert described[first.name] == {"name": first.name, "bytes": first.stat().st_size, "sha256": digest}
    assert (tmp_path / "a" / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    verify(tmp_path / "a")
    # What is loaded from either is one model.
    model, variables, _ = moejax.load(tmp_path / "a")
    other, theirs, _ = moejax.load(source)
    assert model.config == other.config
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(theirs), strict=True))


def test_into_another_dtype(tmp_path, source, assert_equal_trees):
    convert(source, tmp_path / "a", "bfloat16", verify=True)
    config = read_metadata(tmp_path / "a").config
    assert config.param_dtype == "bfloat16"
    assert_equal_trees(read_parameters(source, config, "bfloat16"), restore_params(tmp_path / "a", config))
    edit_tensor(source, lambda tensors: next(iter(tensors.values())).fill(1e6))
    with pytest.raises(UserError, match=r"holds a number that is NaN or infinite, as float16"):
        convert(source, tmp_path / "b", "float16")
    with pytest.raises(UserError, match="dtype='int8'; expected one of float32"):
        convert(source, tmp_path / "b", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]


def test_a_dry_run_says_all_and_writes_nothing(tmp_path, source, monkeypatch):
    said: list[str] = []
    convert(source, tmp_path / "deep" / "a", dry_run=True, say=said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    for part in (
        "5 files",
        "mixtral, 3 layers",
        "of float32 in",
        "carries generation_config.json, tokenizer_config.json; EOS 2, 4",
        "are free",
    ):
        assert part in said[0]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"no room to save .*/a: it needs [\d,]+ bytes, 1,000 are free"):
        convert(source, tmp_path / "deep" / "a", dry_run=True)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from moejax.checkpoint import conversion, stream, transfer

source, destination = sys.argv[1:]
stream.LARGEST_CHUNK = conversion.LARGEST_CHUNK = 20_000
write_piece = transfer.write_piece

def write_slowly(*arguments):
    time.sleep(0.02)
    sums = write_piece(*arguments)
    time.sleep(0.02)
    return sums

transfer.write_piece = write_slowly
journal = Path(destination).with_name(".a.converting") / "journal.jsonl"
count = lambda: len(journal.read_bytes().splitlines()) if journal.exists() else 0
for _ in range(5):
    wanted = count() + random.randrange(1, 9)
    process = os.fork()  # imports are paid for once
    if process == 0:
        conversion.convert(source, destination)
        os._exit(0)
    while count() < wanted:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.03))
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert not Path(destination).exists()
    print(count())
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, monkeypatch, small_chunks, source, run_command):
    monkeypatch.setattr(conversion, "LARGEST_CHUNK", 20_000)
    convert(source, tmp_path / "whole")
    result = run_command(["python", "-c", KILLED, source, tmp_path / "a"])
    assert result.returncode == 0, result.stderr
    done = [int(line) for line in result.stdout.splitlines()]
    assert done == sorted(done)
    assert len(set(done)) == 5  # each went on where the one before was
    # A piece that the kill or the disk damaged is not believed.
    victim = sorted((tmp_path / ".a.converting" / "checkpoint" / "params").rglob("*.0.0*"))[0]
    victim.write_bytes(b"\x01" * victim.stat().st_size)
    said: list[str] = []
    convert(source, tmp_path / "a", say=said.append)
    assert "goes on with a conversion that was stopped" in said[1]
    assert read_files(tmp_path / "a") == read_files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source", "whole"]


@pytest.mark.parametrize("moment", ["write_manifest", "sync_directory", "move_into_place", "shutil.rmtree"])
def test_stopped_while_it_completes(tmp_path, monkeypatch, source, moment):
    """An interrupt leaves what a kill would leave; the next run ends as if there had been none."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    convert(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(f"moejax.checkpoint.conversion.{moment}", stop)
        # The first rmtree empties the place for a conversion that begins; what it stops is the beginning.
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    convert(source, tmp_path / "a")
    assert read_files(tmp_path / "a") == read_files(tmp_path / "whole")


def test_what_another_conversion_left_is_not_mixed_in(tmp_path, monkeypatch, source, assert_equal_trees):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "a")
    edit_tensor(source, lambda tensors: next(iter(tensors.values())).fill(0.5))
    said: list[str] = []
    convert(source, tmp_path / "a", say=said.append)
    assert not any("goes on" in text for text in said)
    config = read_metadata(tmp_path / "a").config
    assert_equal_trees(read_parameters(source, config), restore_params(tmp_path / "a", config))


def test_two_at_once_do_not_mix(tmp_path, source):
    staging = tmp_path / ".a.converting"
    staging.mkdir()
    with transfer.Journal(staging / "journal.jsonl", "mine"):
        with pytest.raises(UserError, match="another process is converting"):
            convert(source, tmp_path / "a")
        assert staging.is_dir()
    convert(source, tmp_path / "a")


def test_an_existing_destination_is_kept_unless_told(tmp_path, source):
    convert(source, tmp_path / "a")
    before = read_files(tmp_path / "a")
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "a", "bfloat16")
    assert read_files(tmp_path / "a") == before
    convert(source, tmp_path / "a", "bfloat16", overwrite=True)
    assert read_metadata(tmp_path / "a").config.param_dtype == "bfloat16"
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no checkpoint of moejax; it is not overwritten"):
        convert(source, tmp_path / "mine", overwrite=True)
    with pytest.raises(UserError, match="is a checkpoint of moejax already"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        convert(source, tmp_path / "file" / "a")


def _truncate(source):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def _remove_shard(source):
    sorted(source.glob("*.safetensors"))[1].unlink()


def _point_outside(source):
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = "../other/model.safetensors"
    index.write_text(json.dumps(values))


def _damage_header(source):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes().replace(b'"dtype"', b'"dtypo"', 1))


def _put(value):
    def edit(tensors):
        last = list(tensors.values())[-1]
        last.reshape(-1)[last.size // 2] = value

    return lambda source: edit_tensor(source, edit)


def _reshape(tensors):
    name = sorted(name for name in tensors if tensors[name].ndim == 2)[0]
    tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])


@pytest.mark.parametrize(
    "damage, message",
    [
        (_truncate, r"model-00002-of-00005\.safetensors holds .* it is truncated"),
        (_remove_shard, r"lacks 1 \(model-00002-of-00005\.safetensors\) of the 5 files"),
        (_damage_header, r"model-00002-of-00005\.safetensors has a damaged safetensors header"),
        (_point_outside, r"index\.json places tensors in '\.\./other/model\.safetensors'"),
        (_put(np.nan), r"model-00001-of-00005\.safetensors: tensor \S+ holds a number that is NaN or infinite;"),
        (_put(-np.inf), r"model-00001-of-00005\.safetensors: tensor \S+ holds a number that is NaN or infinite;"),
        (lambda source: edit_tensor(source, _reshape), "of the wrong shape"),
        (lambda source: edit_tensor(source, lambda tensors: tensors.pop(sorted(tensors)[0])), "in files that do not hold them"),
        (lambda source: edit_tensor(source, lambda tensors: tensors.update(odd=np.zeros(3, np.float32))), r"its files hold 1 \(odd\)"),
        (lambda source: (source / "config.json").unlink(), r"has no config\.json"),
    ],
)
def test_a_damaged_source_is_named_and_nothing_is_left(tmp_path, source, damage, message):
    damage(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_comparison_that_fails_leaves_nothing(tmp_path, monkeypatch, source):
    def write_wrongly(directory, layout, index, piece):
        wrong = piece.copy()
        wrong.reshape(-1)[-1] += 1
        return stream.write_piece(directory, layout, index, wrong if "moe.up" in layout.folder else piece)

    monkeypatch.setattr(transfer, "write_piece", write_wrongly)
    with pytest.raises(UserError, match=r"moe/up/kernel\[\d, \d\] is not what model\.layers\.\d\.block_sparse_moe.* holds"):
        convert(source, tmp_path / "a", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
