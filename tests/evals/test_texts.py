"""What evaluations read: the run behind a checkpoint, the text it held out, other text."""

from __future__ import annotations

import dataclasses

import pytest

import moejax
from moejax.config import RunConfig, UserError
from moejax.evals.texts import find_run, read_held_out, read_text, trained_length
from tests.conftest import ROOT, SHORT_RUN, run_command, write_text
from tests.evals.conftest import CONFIG


def test_the_length_trained_with_is_that_of_the_rows():
    run = RunConfig()
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=20))
    assert trained_length(CONFIG, None) == 32
    assert trained_length(CONFIG, run) == 20
    assert trained_length(dataclasses.replace(CONFIG, max_length=16), run) == 16


def test_a_model_of_no_run_held_nothing_out(saved, tokenizer):
    assert find_run(str(saved)) is None
    with pytest.raises(UserError, match="is of no run of ours, so nothing was held out"):
        read_held_out(str(saved), None, tokenizer)


def test_other_text_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a.txt").write_text("first\nsecond\nthird\n")
    assert [document.text for document in read_text(str(tmp_path / "a.txt"), 13)] == ["first\nsecond\n"]
    assert sum(len(document.text) for document in read_text("builtin:passkey", 5000)) <= 5000


@pytest.mark.slow
def test_a_run_s_held_out_text_is_what_it_was_evaluated_on(tmp_path):
    write_text(tmp_path / "text")
    flags = [*SHORT_RUN, "--run-dir", "run", "--train.steps", "2", "--model.num-layers", "1", "--data.sequence-length", "64"]
    result = run_command(["python", ROOT / "train.py", *flags], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = find_run(str(tmp_path / "run"))
    assert run is not None and trained_length(run.model, run) == 64
    found = read_held_out(str(tmp_path / "run"), run, moejax.load_tokenizer(tmp_path / "run"))
    whole = {file.name: file.read_text() for file in (tmp_path / "text").iterdir()}
    assert list(found) == ["text"] and found["text"]
    assert all(whole[document.name] == document.text for document in found["text"])
