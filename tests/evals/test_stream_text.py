"""The text of a stream: of all documents, spread evenly, each token once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moejax.checkpoint import store
from moejax.config import DataConfig, ModelConfig, RunConfig, UserError, to_json
from moejax.data.documents import Document
from moejax.data.text import train_tokenizer
from moejax.evals.stream_text import find_run, read_held_out, read_text, spread_evenly
from moejax.model.transformer import Transformer
from tests.conftest import write_text


class Letters:
    """A tokenizer whose ids are the characters' codes."""

    def encode_batch(self, texts, threads=None):
        return [[ord(letter) for letter in text] for text in texts]


DOMAINS = {
    "many": [Document(f"m{number}", "a" * 97) for number in range(40)],  # 3,600 letters in whole pieces of 10
    "few": [Document("f", "b" * 900)],
    "short": [Document("s", "c" * 9)],
}


@pytest.mark.parametrize("tokens", [4500, 2000, 777])
def test_any_stretch_has_every_domain_in_its_share(tokens):
    ids = spread_evenly(DOMAINS, Letters(), tokens, 10)
    assert (len(ids), ids.dtype) == (tokens, np.int32)
    assert set(Counter(ids.tolist())) == {ord("a"), ord("b")}  # what is shorter than a piece is left out
    for start in range(0, tokens - 200, 50):
        assert Counter(ids[start : start + 200].tolist())[ord("b")] / 200 == pytest.approx(0.2, abs=0.06)


def test_pieces_are_whole_and_none_comes_twice():
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    ids = spread_evenly({"text": [Document("t", letters)]}, Letters(), 1000, 25).reshape(-1, 25)
    assert np.all(np.diff(ids, axis=1) == 1)
    assert len(set(ids.ravel().tolist())) == 1000
    assert not np.all(np.diff(ids[:, 0]) > 0)  # and they are drawn, not read in order


def test_too_little_text_says_what_to_do():
    with pytest.raises(UserError, match=r"tokens=4,501, but the text has only 4,500 in whole pieces of 10; .*--period.*--text.*held-out"):
        spread_evenly(DOMAINS, Letters(), 4501, 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with one checkpoint, whose text lies beside it."""
    folder = tmp_path_factory.mktemp("run")
    write_text(folder / "text")
    tokenizer = train_tokenizer([path.read_text() for path in (folder / "text").iterdir()], 300)
    model = ModelConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_experts=2)
    config = RunConfig(run_dir=str(folder / "run"), model=model, data=DataConfig(path=str(folder / "text"), held_out_fraction=0.2))
    import jax

    from moejax.model.transformer import init_parameters

    params = init_parameters(Transformer(model), jax.random.key(0))
    step = store.step_directory(folder / "run", 1)
    store.save(step, params, model, step=1, run=to_json(config), write_extra=lambda place: tokenizer.save(place))
    return folder / "run", config, tokenizer


@pytest.mark.parametrize("below", ["", "checkpoints/00000001"])
def test_what_a_run_held_out_is_found_again(run, below):
    from moejax.data.prepare import prepare

    directory, config, tokenizer = run
    found = find_run(str(directory / below))
    assert found == config
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
    documents = read_text(str(directory), 10**6)["text"]
    assert sorted(document.text for document in documents) == sorted(path.read_text() for path in directory.iterdir())
