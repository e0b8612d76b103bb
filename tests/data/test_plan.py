"""What --data-plan says, of text that is prepared, that lies there, and that does not."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from moejax.config import DataConfig, Domain, ModelConfig, RunConfig, Stage, TrainConfig
from moejax.data import plan
from tests.conftest import ROOT, run_command


@pytest.fixture
def config(tmp_path):
    """1,000 rows of 64 tokens in two stages; the boundary, row 625, lies within a step of 10."""
    domains = (Domain("web", str(tmp_path / "web")), Domain("code", str(tmp_path / "code" / "*.py")), Domain("sql", "builtin:sql"))
    stages = (Stage(40_000, {"web": 3, "code": 1}), Stage(24_000, {"code": 2, "sql": 2}))
    data = DataConfig(domains=domains, stages=stages, sequence_length=64, held_out_fraction=0.125, max_megabytes=0.004)
    return RunConfig(name="planned", model=ModelConfig(max_length=64), data=data, train=TrainConfig(batch_size=10))


def table(text: str, title: str) -> dict[str, list[str]]:
    """domain -> share, tokens, epochs of the table under a title."""
    block = next(block for block in text.split("\n\n") if block.startswith(title))
    return {words[0]: words[1:] for words in (line.split() for line in block.splitlines()[2:]) if len(words) == 4}


def test_stages_shares_and_tokens_are_those_that_are_read(config):
    text = plan.describe_plan(config, lambda domain: {"web": 15_000}.get(domain.name))
    assert text.startswith("planned: 100 steps of 10 rows of 64 tokens, 64k tokens in 2 stages\n")
    assert "stage 1  begins at step 1 (row 0), 40k tokens\n" in text
    assert "stage 2  begins at step 63 (row 625), 24k tokens\n" in text
    first, second, whole = (table(text, title) for title in ("stage 1", "stage 2", "whole run"))
    assert list(first) == ["web", "code"] and list(second) == ["code", "sql"] and list(whole) == ["web", "code", "sql"]
    assert first["web"] == ["75.0%", "30k", "2.00"]  # 468 rows of 64 tokens
    assert second["code"][0] == second["sql"][0] == "50.0%"
    assert whole["web"][0] == "46.8%" and whole["web"][2] == "2.00"
    assert first["code"][2] == second["code"][2] == whole["code"][2] == "?"
    assert whole["sql"][2].startswith("~")
    assert re.search(r"^  web is read to its end by step 32, then again in another order$", text, re.MULTILINE)


def test_text_is_measured_by_what_lies_there(config, tmp_path):
    (tmp_path / "web" / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "web" / "one.txt").write_text("x" * 1000)
    (tmp_path / "web" / "deep" / "two.jsonl").write_text("x" * 600)
    (tmp_path / "web" / "deep" / ".hidden" / "three.txt").write_text("x" * 9000)
    (tmp_path / "web" / "picture.png").write_bytes(b"x" * 9000)  # no text: it is not read
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "notes.txt").write_text("x" * 9000)
    web, code, sql = config.data.domains
    data = config.data
    assert plan.measure_text(web, data, lambda domain: None).tokens == 400  # 1,600 bytes less an eighth, at 3.5 a token
    assert "1.6kB of 2 files" in plan.measure_text(web, data, lambda domain: None).origin
    assert plan.measure_text(code, data, lambda domain: None) == plan.TextSize(None, "not prepared; nothing there yet")
    (tmp_path / "code" / "much.py").write_text("x" * 9000)
    assert plan.measure_text(code, data, lambda domain: None).tokens == 1000  # 4 kB at most are read
    assert plan.measure_text(sql, data, lambda domain: None).tokens == 1000
    assert plan.measure_text(dataclasses.replace(web, path=str(tmp_path / "web" / "one.txt")), data, lambda d: None).tokens == 250
    prepared = plan.measure_text(web, data, lambda domain: 7 if domain.name == "web" else None)
    assert (prepared.tokens, prepared.is_estimate) == (7, False)
    hub = Domain("hub", "hf://datasets/owner/name")
    assert plan.measure_text(hub, data, lambda domain: None) == plan.TextSize(None, "not prepared; on the Hub")


def test_a_run_of_another_length_than_its_stages_says_so(config):
    def plan_of(steps):
        return plan.describe_plan(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), lambda domain: None)

    assert "stage 1  begins at step 1 (row 0), 32k tokens of its 40k: train.steps ends the run" in plan_of(50)
    assert "stage 2  begins at step 63 (row 625): not reached by this run" in plan_of(50)
    assert "24k tokens" in plan_of(100) and "train.steps" not in plan_of(100)
    assert "stage 2  begins at step 63 (row 625), 88k tokens: its own 24k, and on with the same mixture" in plan_of(200)


def test_weights_that_are_rounded_are_told(config):
    stages = (Stage(10**10, {"web": 0.123456789, "code": 0.5}), Stage(24_000, {"code": 0.987654321, "sql": 0.1}))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stages=stages))
    text = plan.describe_plan(config, lambda domain: None)
    assert text.count("rounded to multiples of 1/65,536 from row 0 on") == 1


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (6144, "6.144k"), (614_400, "614.4k"), (999_999, "1M"), (1.5e12, "1.5T")]
)
def test_counts_are_short(number, text):
    assert plan.format_count(number) == text


def test_the_plan_of_3_5_trillion_tokens_needs_nothing_and_loads_nothing(tmp_path):
    """Not even jax: neither a device nor a second of start."""
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['train.py', {str(ROOT / 'configs' / 'arctic_480b.py')!r}, '--data-plan']\n"
        "try:\n    runpy.run_path(" + repr(str(ROOT / "train.py")) + ", run_name='__main__')\n"
        "except SystemExit as end:\n    print(json.dumps([end.code, sorted({'jax', 'grain', 'flax'} & set(sys.modules))]))\n"
    )
    result = run_command(["python", "-c", code], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *text, ended = result.stdout.splitlines()
    assert json.loads(ended) == [None, []]
    assert text[0] == "arctic_480b: 834,466 steps of 1,024 rows of 4,096 tokens, 3.5T tokens in 3 stages"
    assert sum(line.startswith("stage ") for line in text) == 3
    assert sum("nothing there yet" in line for line in text) == 6
    assert list(tmp_path.iterdir()) == []
