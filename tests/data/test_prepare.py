"""The preparation of a run's data: the same again from the cache, from the text, after a stop; and what a run that goes on reads."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from moejax.config import DataConfig, Domain, UserError
from moejax.data import held_out
from moejax.data import prepare as prepare_module
from moejax.data.prepare import find_prepared_tokens, prepare

LENGTH = 16


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(10):
        (tmp_path / "text" / f"{n}.txt").write_text(f"file {n} has some words, and tells a short story\n" * (n + 5))
    domains = (Domain("sql", "builtin:sql", max_megabytes=0.025), Domain("mine", str(tmp_path / "text")))
    return DataConfig(domains=domains, sequence_length=LENGTH, max_megabytes=0.05, held_out_fraction=0.2)


def test_preparing_again_gives_the_same(data, tmp_path):
    lines: list[str] = []
    first = prepare(data, 512, tmp_path / "run", lines.append)
    assert [line.split(":")[0] for line in lines] == ["sql", "mine"]
    assert sum(len(d.text.encode()) for d in first.held_out["sql"]) + first.rows["sql"].num_tokens > 0
    again = prepare(data, 512, tmp_path / "run", lines.append)
    assert "kept" in lines[-1]
    anew = prepare(dataclasses.replace(data, cache_dir=str(tmp_path / "other")), 512, tmp_path / "run", lines.append)
    for other in (again, anew):
        assert other.tokenizer.model_bytes == first.tokenizer.model_bytes and other.held_out == first.held_out
        for name in ("sql", "mine"):
            assert (other.rows[name].ids == first.rows[name].ids).all() and (other.rows[name].offsets == first.rows[name].offsets).all()
    assert first.tokenizer.vocab_size <= 512
    trained_on = {first.tokenizer.decode(ids.tolist()) for ids in np.split(first.rows["mine"].ids, first.rows["mine"].offsets[1:-1])}
    assert (
        trained_on.isdisjoint(document.text for document in first.held_out["mine"]) and len(trained_on) + len(first.held_out["mine"]) == 10
    )


def test_generated_text_is_read_in_proportion_to_its_weight(data, tmp_path):
    prepared = prepare(data, 512, tmp_path, lambda line: None)
    everything = len(prepared.tokenizer.decode(prepared.rows["sql"].ids.tolist()))
    everything += sum(len(document.text) for document in prepared.held_out["sql"])
    assert 0.9 * 25_000 < everything <= 25_000


def test_a_given_tokenizer_is_used_kept_and_checked(data, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "given")
    given = dataclasses.replace(data, tokenizer=str(tmp_path / "given"))
    with pytest.raises(UserError, match=rf"given'? has {tokenizer.vocab_size} pieces but model.vocab_size=512; set --model.vocab-size"):
        prepare(given, 512, tmp_path / "run", lambda line: None)
    prepared = prepare(given, 1024, tmp_path / "run", lambda line: None)
    assert prepared.tokenizer.model_bytes == tokenizer.model_bytes == (tmp_path / "run" / "tokenizer.model").read_bytes()
    prepare(data, 512, tmp_path / "other", lambda line: None)
    with pytest.raises(UserError, match="begun with another tokenizer"):
        prepare(given, 1024, tmp_path / "other", lambda line: None)


def text_of(prepared, name):
    """All text of a domain, sorted: what is trained on and what is held out."""
    rows = prepared.rows[name]
    trained = [prepared.tokenizer.decode(ids.tolist()) for ids in np.split(rows.ids, rows.offsets[1:-1])]
    return sorted([*trained, *(document.text for document in prepared.held_out[name])])


@pytest.mark.parametrize("workers", [1, 2])
def test_text_larger_than_the_head_comes_through_whole(tmp_path, tokenizer, monkeypatch, workers):
    """Streamed, in worker processes: every document once, in order, and the same as in one process."""
    for module in (held_out, prepare_module):
        monkeypatch.setattr(module, "HEAD", 3000)
    monkeypatch.setattr(prepare_module, "PART", 500)
    texts = [f"document {n} says {'word ' * (n % 40)}" for n in range(400)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save(tmp_path / "tokenizer")
    data = DataConfig(path=str(tmp_path / "x.jsonl"), tokenizer=str(tmp_path / "tokenizer"), workers=workers, cache_dir=str(tmp_path / "c"))
    prepared = prepare(data, 1024, tmp_path / "run", lambda line: None)
    assert text_of(prepared, "text") == sorted(texts)
    assert 0.01 < len(prepared.held_out["text"]) / 400 < 0.06
    order = [
        int(prepared.tokenizer.decode(ids[:12].tolist()).split()[1])
        for ids in np.split(prepared.rows["text"].ids, prepared.rows["text"].offsets[1:-1])
    ]
    assert order == sorted(order)


def test_what_is_left_out_is_told(tmp_path):
    lines: list[str] = []
    (tmp_path / "x.jsonl").write_text('{"text": "one two three"}\n{"text": " "}\noops\n{"text": "four five six"}\n')
    data = DataConfig(path=str(tmp_path / "x.jsonl"), skip_bad=True)
    prepare(data, 300, tmp_path / "run", lines.append)
    assert len(lines) == 1 and "; 1 empty left out; 1 left out as bad, the first: " in lines[0] and "line 3 is not JSON" in lines[0]
    with pytest.raises(UserError, match="line 3 is not JSON"):
        prepare(dataclasses.replace(data, skip_bad=False), 300, tmp_path / "other", lines.append)


def test_bad_text_far_into_a_source_leaves_no_entry(tmp_path, tokenizer, monkeypatch):
    for module in (held_out, prepare_module):
        monkeypatch.setattr(module, "HEAD", 100)
    (tmp_path / "x.jsonl").write_text('{"text": "some words"}\n' * 1000 + "oops\n")
    tokenizer.save(tmp_path / "tokenizer")
    data = DataConfig(path=str(tmp_path / "x.jsonl"), tokenizer=str(tmp_path / "tokenizer"), cache_dir=str(tmp_path / "c"), workers=1)
    with pytest.raises(UserError, match="line 1001 is not JSON"):
        prepare(data, 1024, tmp_path / "run", lambda line: None)
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_a_domain_without_text_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    domains = (Domain("sql", "builtin:sql", max_megabytes=0.01), Domain("mine", str(tmp_path / "x.jsonl")))
    with pytest.raises(UserError, match="no text found for data domain 'mine'"):
        prepare(DataConfig(domains=domains), 300, tmp_path / "run", lambda line: None)


def test_one_document_longer_than_many_rows_spans_them(tmp_path):
    (tmp_path / "x.txt").write_text("".join(f"line {n} of a long text\n" for n in range(200)))
    prepared = prepare(DataConfig(path=str(tmp_path / "x.txt"), sequence_length=LENGTH), 300, tmp_path / "run", lambda line: None)
    rows = prepared.rows["text"]
    assert len(rows) > 20 and len(rows.offsets) == 2
    assert all((rows[n].segments == 1).all() and rows[n].weights.all() for n in range(len(rows) - 1))


def take_steps(directory):
    """What a run leaves that has trained."""
    (directory / "checkpoints" / "00000005").mkdir(parents=True)


def change_packages(monkeypatch):
    """What an upgrade of Python or of a package does to builtin text."""
    monkeypatch.setattr("moejax.data.sources._BUILTIN_VERSION", 99)
    monkeypatch.setattr("moejax.data.sql.generate_document", lambda seed, index: f"-- other text {seed} {index}\n" * 20)


@pytest.fixture
def begun(data, tmp_path):
    """A run that has taken steps, and what it began with."""
    data = dataclasses.replace(data, cache_dir=str(tmp_path / "cache"))
    first = prepare(data, 512, tmp_path / "run", lambda line: None)
    take_steps(tmp_path / "run")
    return data, first, tmp_path / "run"


def change_files(data):
    from pathlib import Path

    (Path(data.domains[1].path) / "0.txt").write_text("something else altogether\n" * 9)


def test_a_run_goes_on_with_what_it_began_with(begun, monkeypatch, tmp_path):
    data, first, run = begun
    change_packages(monkeypatch)
    change_files(data)
    before = (run / "data.json").read_bytes()
    again = prepare(data, 512, run, lambda line: None)
    assert all((again.rows[name].ids == first.rows[name].ids).all() for name in ("sql", "mine")) and again.held_out == first.held_out
    assert (run / "data.json").read_bytes() == before
    # A cache that was moved is looked for where it is said to be now; one that is elsewhere, where it was.
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = dataclasses.replace(data, cache_dir=str(tmp_path / "moved"))
    assert prepare(moved, 512, run, lambda line: None).held_out == first.held_out
    elsewhere = dataclasses.replace(data, cache_dir=str(tmp_path / "elsewhere"))
    assert prepare(elsewhere, 512, run, lambda line: None).held_out == first.held_out
    # Another run takes the text as it is now.
    other = prepare(moved, 512, tmp_path / "other", lambda line: None)
    assert text_of(other, "mine") != text_of(first, "mine") and text_of(other, "sql") != text_of(first, "sql")


@pytest.mark.parametrize("loss", ["gone", "flipped"])
def test_tokens_that_are_lost_are_made_again_if_they_come_out_the_same(begun, monkeypatch, tmp_path, loss):
    data, first, run = begun
    record = json.loads((run / "data.json").read_text())["domains"]

    def lose():
        for name in record:
            entry = tmp_path / "cache" / record[name]["key"]
            if loss == "gone":
                shutil.rmtree(entry)
            else:
                values = bytearray((entry / "ids.bin").read_bytes())
                values[1000] ^= 1
                (entry / "ids.bin").unlink()  # what `first` has open stays as it is
                (entry / "ids.bin").write_bytes(bytes(values))

    lose()
    lines: list[str] = []
    again = prepare(data, 512, run, lines.append)
    assert all((again.rows[name].ids == first.rows[name].ids).all() for name in ("sql", "mine")) and again.held_out == first.held_out
    assert sum("broken" in line for line in lines) == (0 if loss == "gone" else 2)
    lose()
    change_files(data)
    with pytest.raises(UserError, match=r"tokens of data domain 'mine' that the run in .* has trained on are gone from") as caught:
        prepare(data, 512, run, lines.append)
    assert "start another run with --run-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert json.loads((run / "data.json").read_text())["domains"] == record


def test_a_run_without_steps_takes_the_text_as_it_is(begun):
    data, first, run = begun
    shutil.rmtree(run / "checkpoints")
    change_files(data)
    again = prepare(data, 512, run, lambda line: None)
    assert text_of(again, "mine") != text_of(first, "mine")
    assert again.tokenizer.model_bytes == first.tokenizer.model_bytes


def test_a_record_that_is_lost_or_broken_is_told(begun):
    data, _, run = begun
    (run / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json' cannot be read .* restore it, or start another run"):
        prepare(data, 512, run, lambda line: None)
    (run / "data.json").unlink()
    lines: list[str] = []
    prepare(data, 512, run, lines.append)
    assert "does not say what text it has seen" in lines[0] and (run / "data.json").exists()


def test_a_trained_tokenizer_is_kept_for_other_runs_and_made_again_when_broken(data, tmp_path):
    data = dataclasses.replace(data, cache_dir=str(tmp_path / "cache"))
    first = prepare(data, 512, tmp_path / "a", lambda line: None)
    (kept,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.model")
    assert kept.read_bytes() == first.tokenizer.model_bytes
    lines: list[str] = []
    prepare(data, 512, tmp_path / "b", lines.append)
    assert len(lines) == 2 and all("kept in" in line for line in lines)
    kept.write_bytes(kept.read_bytes()[:-7] + b"garbage")
    assert prepare(data, 512, tmp_path / "c", lines.append).tokenizer.model_bytes == first.tokenizer.model_bytes
    assert "the kept tokenizer in" in lines[2] and "broken" in lines[2]
    assert prepare(data, 300, tmp_path / "d", lines.append).tokenizer.model_bytes != first.tokenizer.model_bytes


def test_what_is_prepared_can_be_counted_without_reading_text(data, tmp_path, monkeypatch):
    data = dataclasses.replace(data, cache_dir=str(tmp_path / "cache"))
    count = find_prepared_tokens(data, 512, tmp_path / "run")
    assert [count(domain) for domain in data.domains] == [None, None] and not (tmp_path / "cache").exists()
    prepared = prepare(data, 512, tmp_path / "run", lambda line: None)
    monkeypatch.setattr(prepare_module, "read_documents", None)
    for directory in ("run", "another"):
        count = find_prepared_tokens(data, 512, tmp_path / directory)
        assert [count(domain) for domain in data.domains] == [prepared.rows[domain.name].num_tokens for domain in data.domains]
    change_files(data)
    count = find_prepared_tokens(data, 512, tmp_path / "run")
    assert count(data.domains[0]) is not None and count(data.domains[1]) is None
    gone = dataclasses.replace(data, path=str(tmp_path / "gone"))
    assert find_prepared_tokens(gone, 512, tmp_path / "run")(gone.sources[0]) is None
