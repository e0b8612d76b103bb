"""moejax-report: one page, whole, small, that asks for nothing from anywhere."""

import json
import re
from html.parser import HTMLParser

import pytest

from moejax.config import UserError
from moejax.training.report import run, write_report
from tests.conftest import run_command

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects a page's pictures and links, and checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.sources, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

        self.words.append(" ")

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_whole_small_and_alone(make_run):
    directory = make_run()
    (directory / "curriculum.png").write_bytes(b"\x89PNG")
    path = write_report(directory)
    assert path == directory / "report.html"
    assert path.stat().st_size < 1_000_000
    page = read_page(path)
    assert len(page.images) == 10
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(len(image["alt"]) > 10 for image in page.images)
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|<script", path.read_text())
    assert not list(directory.glob(".report*"))


def test_the_page_says_what_the_run_is(make_run):
    text = read_page(write_report(make_run())).text
    expected = (
        "longstopped", "1,190 step of 2,000", "35 layers", "8 experts of width 128, 2 a token", "goodput",
        "python train.py configs/long.py --train.steps 2000", "newest checkpoint is that of step 900", "3 steps were skipped",
        "prose 1.5000 3.0000 200,000 1,000", "601 to 1,190", "64 x TPU v5, t1v", "29,376 TFLOP/s in bfloat16, listed",
        "prose 75%, code 25%",
    )  # fmt: skip
    assert [words for words in expected if words not in text] == []


def test_a_run_that_has_just_begun(make_run):
    page = read_page(write_report(make_run(rows=1)))
    assert len(page.images) >= 4


def test_a_killed_run_of_an_older_version(make_run):
    directory = make_run()
    for name in ("starts.jsonl", "config.json"):
        (directory / name).unlink()
    lines = (directory / "metrics.jsonl").read_text().splitlines()[:80]
    old = ("step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "expert_load_entropy", "dropped_tokens")
    rows = [{name: row[name] for name in old} for row in map(json.loads, lines)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text[:-40])
    page = read_page(write_report(directory))
    assert len(page.images) == 4
    assert "780 step" in page.text
    assert f"python train.py configs/long.py --run-dir {directory}" in page.text


def test_a_run_without_a_row_yet(make_run):
    directory = make_run()
    for name in ("starts.jsonl", "metrics.jsonl"):
        (directory / name).unlink()
    page = read_page(write_report(directory))
    assert page.images == []
    assert "No step has been recorded yet" in page.text


def test_names_are_no_html(make_run):
    directory = make_run()
    (directory / "metrics.jsonl").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["name"] = "<b>&amp;"
    (directory / "config.json").write_text(json.dumps(config))
    assert "<b>&amp;stopped" in read_page(write_report(directory)).text


def test_the_command_writes_where_it_is_told(make_run, tmp_path, capsys):
    directory = make_run()
    (directory / "metrics.jsonl").unlink()
    run([str(directory), "--out", str(tmp_path / "page.html")])
    assert "page.html" in capsys.readouterr().out
    assert not (directory / "report.html").exists()
    with pytest.raises(UserError, match=r"cannot write the report .*--out"):
        run([str(directory), "--out", str(tmp_path / "no" / "page.html")])
    with pytest.raises(UserError, match="a run's directory is needed"):
        run([])


def test_what_is_no_run_is_one_line_and_status_2(tmp_path):
    result = run_command(["python", "-m", "moejax.training.report", tmp_path])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
