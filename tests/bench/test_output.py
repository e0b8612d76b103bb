"""What benchmarks print and write: the same keys in each, JSON alone, comparisons, and files that cannot be compared with."""

from __future__ import annotations

import json
import re

import pytest

from moejax.bench.output import COMMON, Output, check_output, report
from moejax.config import UserError
from moejax.results import write_result
from tests.conftest import run_command


def test_the_first_row_stands_on_top_and_every_common_key_is_there(capsys):
    rows = [{"name": "a", "tokens_per_second": 3.0, "seconds": 2.0, "own": 1}, {"name": "b", "tokens_per_second": 5.0}]
    result = report("moe", {"num_experts": 8, "rows": rows}, Output(json="-"))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    assert set(COMMON) <= result.keys()
    assert (result["tokens_per_second"], result["seconds"], result["flops_per_second"]) == (3.0, 2.0, None)
    assert "own" not in result and result["rows"] == rows and result["peak_resident_bytes"] > 1e7


def test_a_file_appears_whole_beside_the_table(tmp_path, capsys):
    report("train", {"flops_per_second": 2.5e9}, Output(json=str(tmp_path / "new.json")))
    assert json.loads((tmp_path / "new.json").read_text())["flops_per_second"] == 2.5e9
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]
    captured = capsys.readouterr()
    assert re.search(r"^flops_per_second +2.5 GFLOP/s$", captured.out, re.MULTILINE)
    assert "new.json" in captured.err and "new.json" not in captured.out.replace("--json", "")


def test_against_has_now_before_and_their_ratio(tmp_path, capsys):
    earlier = tmp_path / "earlier.json"
    report("train", {"tokens_per_second": 100.0, "peak_resident_bytes": 4e9}, Output(json=str(earlier)))
    capsys.readouterr()
    report("train", {"tokens_per_second": 150.0, "peak_resident_bytes": 1e9, "added": 7}, Output(against=str(earlier)))
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["now"] == ["before", "now/before"]
    assert lines["tokens_per_second"] == ["150", "100", "1.500"]
    assert lines["peak_resident_bytes"] == ["1,000.0", "MB", "4,000.0", "MB", "0.250"]
    assert lines["added"] == ["7"]


def test_rows_are_compared_by_name_and_those_of_one_side_are_named(tmp_path, capsys):
    earlier = tmp_path / "earlier.json"
    report("moe", {"rows": [{"name": "x", "seconds": 2.0}, {"name": "gone", "seconds": 2.0}]}, Output(json=str(earlier)))
    capsys.readouterr()
    report("moe", {"rows": [{"name": "new", "seconds": 9.0}, {"name": "x", "seconds": 1.0}]}, Output(against=str(earlier)), ("seconds",))
    text = capsys.readouterr().out
    assert re.search(r"^x: seconds +1 +2 +0.500$", text, re.MULTILINE)
    assert "not in both: gone, new" in text and "gone:" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it cannot be read (No such file or directory)"),
        ("{", "it is no JSON"),
        ("\xff\xfe", "it is no JSON"),
        ("[1]", "it has no field `benchmark`"),
        ('{"benchmark": "data"}', "it is of benchmark 'data'; compare like with like"),
        ('{"benchmark": "train", "rows": [{"seconds": 1}]}', "its `rows` are no list of named results"),
    ],
)
def test_a_file_that_cannot_be_compared_with(tmp_path, content, message):
    file = tmp_path / "earlier.json"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        check_output("train", Output(against=str(file)))
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="is a directory; give a file"):
        check_output("train", Output(json=str(tmp_path)))
    with pytest.raises(UserError, match=r"there is no directory .*missing; make it"):
        check_output("train", Output(json=str(tmp_path / "missing" / "x.json")))
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*taken"):
        write_result(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_refuses_it_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text('{"benchmark": "moe"}')
    result = run_command(["python", "-m", "moejax.bench", "train", "--against", tmp_path / "other.json"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --against") and len(result.stderr.splitlines()) == 1
