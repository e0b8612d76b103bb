"""What evaluations read: the run that a checkpoint is of, what it held out, and other text."""

from __future__ import annotations

import jax
import pytest

from moejax.checkpoint import store
from moejax.config import DataConfig, ModelConfig, RunConfig, UserError, to_json
from moejax.data.text import train_tokenizer
from moejax.evals.texts import find_run, read_held_out, read_text, trained_length
from moejax.model.transformer import Transformer, init_parameters
from tests.conftest import write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with one checkpoint, whose text lies beside it."""
    folder = tmp_path_factory.mktemp("run")
    write_text(folder / "text")
    tokenizer = train_tokenizer([path.read_text() for path in (folder / "text").iterdir()], 300)
    model = ModelConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_experts=2)
    config = RunConfig(run_dir=str(folder / "run"), model=model, data=DataConfig(path=str(folder / "text"), held_out_fraction=0.2))
    params = init_parameters(Transformer(model), jax.random.key(0))
    step = store.step_directory(folder / "run", 1)
    store.save(step, params, model, step=1, run=to_json(config), write_extra=lambda place: tokenizer.save(place))
    return folder / "run", config, tokenizer


@pytest.mark.parametrize("below", ["", "checkpoints/00000001"])
def test_what_a_run_held_out_is_found_again(run, below):
    from moejax.data.prepare import prepare

    directory, config, tokenizer = run
    found = find_run(str(directory / below))
    assert found == config and trained_length(config.model, found) == 256
    assert trained_length(config.model, None) == config.model.max_length
    held_out = read_held_out(str(directory / below), found, tokenizer)
    expected = prepare(config.data, 300, directory.with_name("another"), lambda line: None, tokenizer).held_out
    assert held_out == expected and held_out["text"]
    assert not (directory / "data.json").exists()  # nothing is written into the run


def test_a_checkpoint_of_no_run_has_held_out_nothing(run, golden):
    published = str(golden("mixtral_hf").directory)
    assert find_run(published) is None
    with pytest.raises(UserError, match=r"is of no run of ours.*--text"):
        read_held_out(published, None, run[2])


def test_a_text_may_be_named(run):
    directory = run[0].parent / "text"
    documents = read_text(str(directory), 10**6)
    assert sorted(document.text for document in documents) == sorted(path.read_text() for path in directory.iterdir())
