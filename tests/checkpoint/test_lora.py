"""LoRA adapters: merged weights give the references' logits, and nothing is merged in part or silently left out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moejax
from moejax.checkpoint import lora
from moejax.checkpoint.lora import merge_lora, open_adapter
from moejax.checkpoint.names import list_pieces
from moejax.config import UserError
from moejax.families.mixtral import CLASSIC

PEFT_CASES = ["attn", "experts", "down_only", "rslora_router", "converted"]


@pytest.fixture(scope="module")
def tiny(golden):
    """The tiny Mixtral that PEFT's adapters are for: model, parameters, directory."""
    directory = golden("lora_float64").directory
    model, variables, _ = moejax.load(directory / "base", dtype="float32")
    return model, variables["params"], directory


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_both_layouts_of_peft_give_its_logits(tiny, case):
    model, params, directory = tiny
    expected = arrays(directory / case / "expected.npz")
    merged = merge_lora(params, model.config, directory / case)
    for tree, logits in ((params, expected["base_logits"]), (merged, expected["logits"])):
        ours = model.apply({"params": tree}, expected["input_ids"].astype(np.int32)).logits
        assert np.max(np.abs(np.asarray(ours) - logits)) < 1e-5
    assert np.max(np.abs(expected["logits"] - expected["base_logits"])) > 0.1


@pytest.mark.parametrize(
    ("base", "adapter", "expected"),
    [("mixtral_hf", "mixtral_peft_lora", "logits"), ("mixtral_original_safetensors", "mixtral_original_safetensors", "lora_logits")],
)
def test_reference_logits_with_an_adapter(golden, base, adapter, expected):
    reference = golden(adapter)
    model, variables, _ = moejax.load(golden(base).directory, dtype="float32")
    merged = merge_lora(variables["params"], model.config, reference.directory)
    mask = reference.inputs["attention_mask"]
    ours = np.asarray(model.apply({"params": merged}, reference.inputs["input_ids"], mask=mask).logits)
    assert np.max(np.abs(ours - reference.expected[expected])[mask == 1]) < 2e-4


def test_pieces_and_trees_merge_alike_and_round_once(tiny, random_tree, assert_equal_trees, monkeypatch):
    """What the streaming converter does piece by piece; in bfloat16 the sum is rounded, not the update."""
    monkeypatch.setattr(lora, "MERGED_AT_ONCE", 100)  # several blocks of rows
    model, _, directory = tiny
    tree = random_tree(model.config, "bfloat16")
    adapter = open_adapter(directory / "rslora_router", model.config)
    merged = merge_lora(tree, model.config, directory / "rslora_router")
    untouched = 0
    for piece in list_pieces(model.config, CLASSIC):
        ours, before = merged, tree
        for name in piece.path:
            ours, before = ours[name], before[name]
        array = before[piece.index].copy()
        exact = array.astype(np.float32)
        adapter.merge_into(piece, array)
        adapter.merge_into(piece, exact)
        assert array.tobytes() == ours[piece.index].tobytes()
        assert array.tobytes() == exact.astype(array.dtype).tobytes()
        if not adapter.touches(piece):
            assert array.tobytes() == before[piece.index].tobytes()
            untouched += 1
    assert untouched == 3 + 2 * (2 + 2)  # embedding, head and final norm; in each layer the norms, key and output projection
    assert_equal_trees(tree, random_tree(model.config, "bfloat16"))


def test_a_given_scale_replaces_the_adapters_own(tiny):
    model, params, directory = tiny
    whole, half = (open_adapter(directory / "attn", model.config, scale) for scale in (None, 1.0))
    piece = next(piece for piece in list_pieces(model.config, CLASSIC) if piece.key.endswith("q_proj.weight"))
    added = [np.zeros(piece.shape, np.float32) for _ in range(2)]
    whole.merge_into(piece, added[0])
    half.merge_into(piece, added[1])
    assert np.abs(added[0]).max() > 0
    np.testing.assert_allclose(added[0], 2 * added[1], rtol=1e-6)
    nothing = merge_lora(params, model.config, directory / "attn", scale=0.0)
    np.testing.assert_array_equal(
        nothing["layers"]["block_0"]["attention"]["query"]["kernel"], params["layers"]["block_0"]["attention"]["query"]["kernel"]
    )
    assert "8 matrices, rank 4, scale 2" in whole.describe()


def test_mistral_adapters_scale_by_two_unless_told(golden):
    case = golden("mixtral_original_safetensors")
    config = moejax.load(case.directory / "hf", dtype="float32")[0].config
    by_file, by_directory = (open_adapter(path, config) for path in (case.directory / "lora.safetensors", case.directory))
    assert {update.scale for adapter in (by_file, by_directory) for updates in adapter.updates.values() for update in updates} == {2.0}
    assert len(by_file.updates) == 3 * (4 + 4 * 3)


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(tiny, tmp_path):
    """A function: a copy of the adapter `case` with its tensors and configuration changed."""

    def edit(case="attn", change=None, **values):
        directory = tmp_path / case
        shutil.copytree(tiny[2] / case, directory)
        config = directory / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))
        tensors = load_file(directory / "adapter_model.safetensors")
        if change is not None:
            change(tensors)
            save_file(tensors, directory / "adapter_model.safetensors")
        return directory

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def rename_all(old, new):
    return lambda tensors: tensors.update({key.replace(old, new): tensors.pop(key) for key in list(tensors) if old in key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename(Q + "A.weight", Q.replace("layers.0", "layers.7") + "A.weight"), r"lora_A or lora_B alone"),
        (rename_all("layers.1", "layers.7"), r"4 \(model.layers.7.*match no matrix of the model"),
        (rename_all("q_proj", "qkv"), r"2 \(model.*qkv.*match no matrix of the model"),
        (lambda t: t.pop(Q + "B.weight"), r"1 \(model.layers.0.self_attn.q_proj\) have lora_A or lora_B alone"),
        (lambda t: t.update({Q + "B.weight": np.ones((17, 4))}), r"lora_A \[4, 16\] and lora_B \[17, 4\] of .*q_proj do not fit"),
        (lambda t: t.update({Q + "B.weight": np.ones((16, 3))}), r"lora_B \[16, 3\] of .*q_proj do not fit"),
        (lambda t: t.update({Q + "A.weight": np.ones((2, 16)), Q + "B.weight": np.ones((16, 2))}), "q_proj has rank 2, .* says 4"),
        (lambda t: t.update({Q + "A.weight": np.full((4, 16), np.nan)}), r"q_proj.lora_A.weight holds NaN or infinity"),
        (lambda t: t.update({Q + "magnitude_vector": np.ones(16)}), "DoRA adapter"),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.ones((40, 16))}), r"1 \(base_model.model.lm_head.weight\): no lora_A"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 40))}), "no lora_A or lora_B"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_are_named(tiny, edited, change, message):
    with pytest.raises(UserError, match=message):
        open_adapter(edited(change=change), tiny[0].config)


def test_fused_experts_that_do_not_fit_are_named(tiny, edited):
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    with pytest.raises(UserError, match=r"of model.layers.0.mlp.experts do not fit: expected, with 4 experts, \[4 \* rank, 16\]"):
        open_adapter(edited("experts", lambda t: t.update({key: t[key][:-1]})), tiny[0].config)


def test_places_without_an_adapter(tiny, tmp_path):
    config = tiny[0].config
    with pytest.raises(UserError, match="does not exist"):
        open_adapter(tmp_path / "nothing", config)
    with pytest.raises(UserError, match=r"holds no adapter: looked for adapter_config.json .* and lora.safetensors"):
        open_adapter(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (tmp_path / "adapter_model.bin").write_text("x")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle, which can run any program and is not read"):
        open_adapter(tmp_path, config)
