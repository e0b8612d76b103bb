"""What the command refuses before a model is read, and what an evaluation tells."""

from __future__ import annotations

import json

import pytest

from moejax.config import UserError
from moejax.evals.output import Output, check_output, load_model, report
from tests.conftest import run_command


def test_places_are_looked_at_before_a_model_is_read(tmp_path):
    for output, message in (
        (Output(), r"passkey asks a model; name one with --checkpoint"),
        (Output(checkpoint="x", json=str(tmp_path)), "--json .* is a directory"),
        (Output(checkpoint="x", figure=str(tmp_path / "a.pdf")), r"expected a file that ends in \.svg or \.png"),
        (Output(checkpoint="x", figure=str(tmp_path / "no" / "a.svg")), "--figure .* there is no directory"),
    ):
        with pytest.raises(UserError, match=message):
            check_output("passkey", output)


def test_a_model_without_a_tokenizer_is_refused(tmp_path, model, variables):
    import moejax

    moejax.save(tmp_path / "bare", model, variables)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_model(Output(checkpoint=str(tmp_path / "bare")))


def test_a_result_has_the_common_keys_and_a_table(capsys):
    rows = [{"name": "a", "accuracy": 0.5}]
    result = report("passkey", {"rows": rows, "keys": 3}, Output(checkpoint="x"), ("accuracy",))
    out = capsys.readouterr().out
    assert "| a    | 0.5      |" in out and "\nkeys " in out
    assert {"evaluation", "checkpoint", "seconds", "device", "date", "command", "cores"} <= result.keys()
    report("passkey", {"rows": rows, "keys": 3}, Output(checkpoint="x", json="-"), ("accuracy",))
    assert json.loads(capsys.readouterr().out)["rows"] == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: got evaluation ''; expected `python -m moejax.evals NAME` with NAME one of lengths, passkey"),
        (["passkey", "--checkpoint", "nowhere"], "error: "),
        (["lengths", "--chekpoint", "x"], "error: unknown flag --chekpoint; the nearest is --checkpoint"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message):
    result = run_command(["python", "-m", "moejax.evals", *arguments])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1
