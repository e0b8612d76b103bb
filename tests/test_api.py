"""The public functions: what they take, what they give back, and what they refuse by name."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import moejax
from moejax.checkpoint import store
from moejax.config import ModelConfig, UserError
from moejax.data.text import train_tokenizer
from moejax.model.transformer import Transformer, abstract_parameters, init_parameters, stack_layers, unstack_layers

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4, max_length=256,
    initializer_range=0.3,
)  # fmt: skip
TOKENS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def variables(model):
    return {"params": jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(0))}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the router sends a token to an expert\n" * 20, "def read(path):\n    return path\n" * 20], 300)


@pytest.fixture(scope="module")
def saved(model, variables, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "saved"
    moejax.save(path, model, variables, tokenizer)
    return path


def assert_equal_trees(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


# -- load and save ------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_to_the_bit(saved, model, variables, tokenizer):
    loaded, loaded_variables, loaded_tokenizer = moejax.load(saved)
    assert loaded.config == model.config
    assert_equal_trees(loaded_variables, variables)
    assert loaded_tokenizer.model_bytes == tokenizer.model_bytes
    assert moejax.load_tokenizer(saved).encode("the token") == tokenizer.encode("the token")


def test_bfloat16_weights_come_back_to_the_bit(tmp_path, variables):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    moejax.save(tmp_path / "half", Transformer(config), half)
    model, loaded, tokenizer = moejax.load(tmp_path / "half")
    assert model.config == config
    assert tokenizer is None
    assert_equal_trees(loaded, half)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)], ids=["name", "type", "numpy"])
def test_a_type_can_be_said_in_every_way(saved, variables, dtype):
    model, loaded, _ = moejax.load(saved, dtype=dtype)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    assert_equal_trees(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables))


def test_float32_as_a_type(saved):
    assert moejax.load(saved, dtype=jnp.float32)[0].config.param_dtype == "float32"


@pytest.mark.parametrize("dtype", ["float8", "int8", jnp.int32, float, 3])
def test_other_types_are_refused(saved, dtype):
    with pytest.raises(UserError, match=r"load\(dtype=.*'float32', 'bfloat16' or 'float16'"):
        moejax.load(saved, dtype=dtype)


def test_what_is_not_there_yet_says_so(saved):
    with pytest.raises(NotImplementedError, match=r"load\(quantize=.*not implemented yet"):
        moejax.load(saved, quantize="int8")


def test_a_mesh_that_cannot_hold_the_model_is_refused(saved, model):
    with pytest.raises(UserError, match=rf"mesh.tensor=8 does not divide model.num_kv_heads={model.config.num_kv_heads}; use one of"):
        moejax.load(saved, moejax.make_mesh(fsdp=1, tensor=8))


def test_weights_are_loaded_to_where_they_lie_on_a_mesh(saved, model, variables):
    mesh = moejax.make_mesh(fsdp=4, expert=2)
    placed, loaded, _ = moejax.load(saved, mesh)
    assert placed.mesh is mesh
    assert_equal_trees(loaded, variables)
    kernel = loaded["params"]["layers"]["block_0"]["moe"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_a_run_its_steps_and_its_newest(tmp_path, model, variables, tokenizer):
    """As training leaves them: the tokenizer lies with the run, or in the checkpoint."""
    for step in (5, 10):
        marked = jax.tree.map(lambda leaf, step=step: leaf + step, variables["params"])
        store.save(store.step_directory(tmp_path, step), marked, model.config, step=step)
    tokenizer.save(tmp_path)
    for path, step in ((tmp_path, 10), (tmp_path / "checkpoints" / "00000005", 5)):
        _, loaded, found = moejax.load(str(path))
        assert_equal_trees(loaded["params"], jax.tree.map(lambda leaf, step=step: leaf + step, variables["params"]))
        assert found.model_bytes == tokenizer.model_bytes


def test_a_published_directory_and_back(golden, tmp_path):
    model, variables, tokenizer = moejax.load(golden("arctic_interleaved").directory)
    assert (model.config.family, tokenizer) == ("arctic", None)
    moejax.save(tmp_path / "ours", model, variables)
    ours, again, _ = moejax.load(tmp_path / "ours")
    assert ours.config == model.config
    assert_equal_trees(variables, again)


def test_a_model_with_unrolled_layers_is_saved_as_every_other(tmp_path, saved, model, variables):
    unrolled = Transformer(dataclasses.replace(CONFIG, scan_layers=False))
    apart = {"params": unstack_layers(variables["params"], CONFIG)}
    moejax.save(tmp_path / "unrolled", unrolled, apart)
    assert_equal_trees(store.restore_params(tmp_path / "unrolled", CONFIG), variables["params"])
    loaded, loaded_variables, _ = moejax.load(tmp_path / "unrolled")
    assert loaded.config == unrolled.config
    assert_equal_trees(loaded_variables, apart)


@pytest.mark.parametrize(("num_layers", "moe_every"), [(4, 1), (5, 2), (4, 2), (1, 2)])
def test_unrolling_is_undone_by_stacking(num_layers, moe_every):
    config = dataclasses.replace(CONFIG, num_layers=num_layers, moe_every=moe_every)
    numbers = iter(range(1000))
    tree = jax.tree.map(
        lambda leaf: np.arange(math.prod(leaf.shape), dtype=np.int32).reshape(leaf.shape) + np.int32(next(numbers)),
        abstract_parameters(config),
    )
    assert_equal_trees(stack_layers(unstack_layers(tree, config), config), jax.tree.map(jnp.asarray, tree))


def test_nothing_is_overwritten(saved, model, variables):
    before = sorted(path.name for path in saved.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        moejax.save(saved, model, variables)
    assert sorted(path.name for path in saved.rglob("*")) == before


def test_variables_of_another_model_are_not_saved(tmp_path, variables):
    other = Transformer(dataclasses.replace(CONFIG, num_experts=8))
    with pytest.raises(UserError, match="moe"):
        moejax.save(tmp_path / "other", other, variables)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_description_names_its_file(saved, tmp_path):
    values = json.loads((saved / "moejax.json").read_text())
    values["model"]["num_layers"] = 2.5
    (tmp_path / "moejax.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"moejax\.json is damaged .*checksum"):
        moejax.load(tmp_path)


# -- generate -----------------------------------------------------------------------------------------------------------


def test_text_gives_text_and_ids_give_ids(model, variables, tokenizer):
    options = {"max_new_tokens": 6, "ignore_eos": True}
    texts = ["the token", "def read"]
    ids = [tokenizer.encode(text) for text in texts]
    many = moejax.generate(model, variables, tokenizer, texts, **options)
    of_ids = moejax.generate(model, variables, tokenizer, ids, **options)
    assert [type(text) for text in many] == [str, str]
    assert [len(new) for new in of_ids] == [6, 6]
    assert many == [tokenizer.decode(new, is_start=False) for new in of_ids]
    assert moejax.generate(model, variables, tokenizer, texts[0], **options) == many[0]
    assert moejax.generate(model, variables, tokenizer, ids[1], **options) == of_ids[1]
    assert moejax.generate(model, variables, None, np.array(ids[1]), **options) == of_ids[1]
    assert moejax.generate(model, variables, tokenizer, [texts[0], ids[1]], **options) == [many[0], of_ids[1]]
    assert moejax.generate(model, variables, tokenizer, [], **options) == []


def test_sampling_depends_on_the_seed_alone(model, variables, tokenizer):
    first, again, other = (
        moejax.generate(model, variables, tokenizer, [5, 6], 12, temperature=1.0, ignore_eos=True, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ("text", {}, "no tokenizer"),
        ([[5], []], {}, "prompt 1 has no tokens"),
        ([5, 300], {}, "token 300"),
        ([5], {"temperature": -1.0}, "temperature=-1.0"),
        ([5], {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_what_cannot_be_continued_is_refused(model, variables, prompts, options, said):
    with pytest.raises(UserError, match=said):
        moejax.generate(model, variables, None, prompts, **options)


# -- the public names ---------------------------------------------------------------------------------------------------


def test_public_names_are_there():
    assert all(getattr(moejax, name) is not None for name in moejax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        moejax.train  # noqa: B018


def test_apply_gives_what_was_asked_for(model, variables):
    out = jax.jit(functools.partial(model.apply, return_hidden=True, return_routing=True))(variables, TOKENS)
    assert out.logits.shape == (2, 12, 300)
    assert out.hidden.shape == (4, 2, 12, 16)
    assert out.routing.experts.shape == (2, 2, 12, 2)
