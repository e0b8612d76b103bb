"""Exported checkpoints read back bit by bit, load in transformers, and are whole or not there."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import moejax
from moejax.checkpoint import mistral_files, store, torch_files
from moejax.checkpoint.export import export
from moejax.config import UserError

LAYOUTS = {"hf": torch_files, "mistral": mistral_files}


def without_head_size(config):
    """params.json always says how wide a head is, a config.json only where it is not the usual width."""
    return dataclasses.replace(config, head_size=config.head_width)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_export_then_import_is_bit_equal(tmp_path, config, random_tree, assert_equal_trees, dtype, to):
    if to == "mistral" and (config.family != "mixtral" or config.tie_embeddings):
        pytest.skip("Mistral's layout has no words for it")
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    tree = random_tree(config, dtype)
    store.save(tmp_path / "ours", tree, config)
    export(tmp_path / "ours", tmp_path / "theirs", to=to, max_shard_size="10KB")
    files = LAYOUTS[to]
    back = files.read_model_config(tmp_path / "theirs")
    ignored = {"router_aux_loss_coefficient": 0.0} if to == "mistral" else {}  # not in params.json
    assert without_head_size(dataclasses.replace(back, **ignored)) == without_head_size(dataclasses.replace(config, **ignored))
    assert_equal_trees(tree, files.read_parameters(tmp_path / "theirs", back))


def test_shards_are_as_transformers_writes_them(tmp_path, small_mixtral, random_tree):
    store.save(tmp_path / "ours", random_tree(small_mixtral), small_mixtral)
    export(tmp_path / "ours", tmp_path / "theirs", max_shard_size=9000)
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    assert sorted(set(index["weight_map"].values())) == shards
    tensors = {name: load_file(tmp_path / "theirs" / name) for name in shards}  # the library reads them
    assert all(sum(value.nbytes for value in shard.values()) <= 9000 for shard in tensors.values())
    assert index["metadata"]["total_size"] == sum(value.nbytes for shard in tensors.values() for value in shard.values())
    export(tmp_path / "ours", tmp_path / "single", max_shard_size="5GB")
    assert sorted(path.name for path in (tmp_path / "single").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_run_is_exported_with_its_tokenizer_from_its_newest_checkpoint(tmp_path, small_mixtral, random_tree, assert_equal_trees):
    tree = random_tree(small_mixtral, "float32")
    older = dict(tree, final_norm={"scale": np.zeros(16, np.float32)})

    def write_defaults(directory):
        (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')

    for step, params in ((1, older), (2, tree)):
        store.save(store.step_directory(tmp_path / "run", step), params, small_mixtral, step=step, write_extra=write_defaults)
    (tmp_path / "run" / "tokenizer.json").write_bytes(b"{}")
    sizes = []
    export(tmp_path / "run", tmp_path / "theirs", report=lambda done, total: sizes.append((done, total)))
    config = torch_files.read_model_config(tmp_path / "theirs")
    assert_equal_trees(tree, torch_files.read_parameters(tmp_path / "theirs", config))
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == b"{}"
    assert json.loads((tmp_path / "theirs" / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert sizes[-1][0] == sizes[-1][1] == sum(value.nbytes for value in load_file(tmp_path / "theirs" / "model.safetensors").values())


def test_refusals_leave_nothing_behind(tmp_path, small_config, small_mixtral, random_tree, golden, monkeypatch):
    for name, config in (("arctic", small_config), ("mixtral", small_mixtral)):
        store.save(tmp_path / name, random_tree(config), config)
    (tmp_path / "there").mkdir()
    for src, dst, options, message in (
        ("mixtral", "there", {}, "there exists already"),
        ("arctic", "new", {"to": "mistral"}, "arctic was never published in Mistral's own layout"),
        ("mixtral", "new", {"to": "gguf"}, r"export\(to='gguf'\): expected 'hf' or 'mistral'"),
        ("mixtral", "new", {"max_shard_size": "5 apples"}, "max_shard_size='5 apples' is no size"),
        (golden("mixtral_hf").directory, "new", {}, r"published checkpoint already \(hf\)"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / src, tmp_path / dst, **options)

    def fail(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "mixtral", tmp_path / "new", report=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arctic", "mixtral", "there"]


TRANSFORMERS = """
import sys, numpy as np, torch, transformers
transformers.logging.disable_progress_bar()
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
model.set_experts_implementation("eager")
inputs = np.load(sys.argv[2])
ids, mask = (torch.tensor(inputs[name]).long() for name in ("input_ids", "attention_mask"))
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask).logits
    rows = [row[:length][None] for row, length in zip(ids, mask.sum(1))]
    settings = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None)
    tokens = [model.generate(row, **settings)[0, row.shape[1]:] for row in rows]
np.savez(sys.argv[3], logits=logits.numpy(), tokens=torch.stack(tokens).numpy())
"""


@pytest.mark.torch
@pytest.mark.parametrize("case", ["mixtral_hf", "mixtral_hf_sharded", "mixtral_original_safetensors"])
def test_transformers_loads_an_exported_mixtral_and_gives_the_golden_logits(golden, tmp_path, case):
    pytest.importorskip("torch", reason="the torch extra is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    reference = golden(case)
    model, variables, _ = moejax.load(reference.directory, dtype="float32")
    moejax.save(tmp_path / "ours", model, variables)
    export(tmp_path / "ours", tmp_path / "theirs", max_shard_size="300KB")
    command = [sys.executable, "-c", TRANSFORMERS, tmp_path / "theirs", reference.directory / "inputs.npz", tmp_path / "out.npz"]
    ran = subprocess.run(command, text=True, capture_output=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    out, real = np.load(tmp_path / "out.npz"), reference.inputs["attention_mask"] == 1
    assert np.max(np.abs(out["logits"] - reference.expected["logits"])[real]) < 2e-4
    assert out["tokens"].tolist() == reference.expected["greedy_tokens"].tolist()
