"""moejax/cli.py: the config among the flags, overrides by name, and every mistake answered in one message."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moejax import cli
from moejax.config import RunConfig, UserError
from tests.conftest import ROOT, run_command

CONFIG = '''"""A run for tests."""

from moejax.config import ModelConfig, RunConfig


def config() -> RunConfig:
    return RunConfig(name="small", model=ModelConfig(num_layers=2))
'''

PROGRAM = """import sys
from moejax.cli import parse_run, run_command

def main(argv):
    config, path, flags, _ = parse_run(argv, "configs/small.py", {"--summary": "print the parameters"})
    print(config.name, config.train.steps, path, *sorted(flags))

run_command(main)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project: a program and one config; the working directory while a test runs."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(CONFIG)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


def parse(*argv: str) -> cli.ParsedRun:
    return cli.parse_run(argv, "configs/small.py", {"--summary": "print the parameters"})


def test_no_argument_is_the_default_config(folder):
    assert parse() == (RunConfig(name="small", model=parse().config.model), Path("configs/small.py"), frozenset(), {})
    assert parse().config.model.num_layers == 2


OVERRIDES = "--run-dir DIR --train.steps 20 --train.save-every 5 --train.log-every=1 --train.batch-size 4 --model.num-experts=4".split()

BETWEEN_FLAGS = [position for position in range(len(OVERRIDES) + 1) if [*OVERRIDES, "--"][position].startswith("--")]


@pytest.mark.parametrize("position", BETWEEN_FLAGS)
def test_overrides_with_the_config_anywhere(folder, position):
    (folder / "configs" / "other.py").write_text(CONFIG.replace("small", "other"))
    config, path, flags, _ = parse(*OVERRIDES[:position], "configs/other.py", *OVERRIDES[position:])
    assert (config.name, path, flags) == ("other", Path("configs/other.py"), frozenset())
    assert config.directory == "DIR"
    assert (config.train.steps, config.train.save_every, config.train.log_every, config.train.batch_size) == (20, 5, 1, 4)
    assert config.model.num_experts == 4
    assert config.model.num_layers == 2  # of the file, not of the defaults


@pytest.mark.parametrize(
    "argv",
    [
        ["--model.scan-layers", "False"],
        ["--model.scan-layers=false"],
        ["--model.scan_layers=False"],
        ["--no-model.scan-layers"],
        ["--model.no-scan-layers"],
        ["--model.no-scan-layers", "True"],
    ],
    ids=" ".join,
)
def test_spellings_of_a_boolean(folder, argv):
    assert parse(*argv).config.model.scan_layers is False
    assert parse("configs/small.py", *argv).config.model.scan_layers is False
    assert parse(*argv, "configs/small.py").config.model.scan_layers is False


def test_a_boolean_flag_takes_no_config_for_its_value(folder):
    run = parse("--model.scan-layers", "configs/small.py", "--sample.ignore-eos")
    assert run.config.model.scan_layers is True
    assert run.config.sample.ignore_eos is True


def test_own_flags_are_taken_out(folder):
    assert parse("--summary", "configs/small.py").flags == {"--summary"}
    assert parse("configs/small.py", "--train.steps", "3", "--summary").flags == {"--summary"}


def test_a_flag_s_value_is_not_taken_for_the_config(folder):
    run = parse("--data.path", "corpus.py")
    assert run.path == Path("configs/small.py")
    assert run.config.data.path == "corpus.py"


def test_other_kinds_of_values(folder):
    config = parse(
        *("--model.eos-token-ids", "5", "6", "--model.head-size", "None", "--data.domains.0.max-megabytes", "2"),
        *("--mesh.fsdp", "-1", "--sample.prompt", "-- every user", "--train.learning_rate", "1e-4"),
    ).config
    assert config.model.eos_token_ids == (5, 6)
    assert config.model.head_size is None
    assert config.data.domains[0].max_megabytes == 2
    assert config.mesh.fsdp == -1
    assert config.sample.prompt == "-- every user"
    assert config.train.learning_rate == 1e-4


def test_configs_of_the_project_build():
    for path in sorted((ROOT / "configs").glob("*.py")):
        config, description = cli.load_config(path, path.parent)
        assert config.name == path.stem
        assert description


REFUSED = {
    "unknown field": (["--model.num-exprts", "4"], ("--model.num-exprts", "--model.num-experts")),
    "unknown field, joined": (["--train.stps=4"], ("--train.stps", "--train.steps")),
    "forgotten section": (["--num-experts", "4"], ("--num-experts", "--model.num-experts")),
    "far from any": (["--model.num-attention-heads", "4"], ("--model.num-attention-heads", "--model.num-heads")),
    "the command's own": (["--sumary"], ("--sumary", "--summary")),
    "no truth value": (["--model.scan-layers=maybe"], ("--model.scan-layers=maybe", "True or False")),
    "within a section": (["--model.num-heads", "7"], ("model.num_heads=7", "model.hidden_size=128", "1, 2, 4")),
    "experts": (["--model.num-experts", "1"], ("model.experts_per_token=2", "model.num_experts=1")),
    "across sections": (["--data.sequence-length", "9999"], ("data.sequence_length=9999", "model.max_length=4096")),
    "no such config": (["configs/smal.py"], ("configs/smal.py", "nearest is configs/small.py")),
    "two configs": (["configs/small.py", "configs/small.py"], ("2 config files", "expected one")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_message(folder, case):
    argv, parts = REFUSED[case]
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.steps", "many"], ("--train.steps", "many", "INT")),
        (["--train.steps", "1.5"], ("--train.steps", "1.5", "INT")),
        (["--train.steps"], ("--train.steps",)),
        (["--model.dispatch", "srted"], ("--model.dispatch", "srted", "sorted")),
        (["small"], ("small",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_values_of_the_wrong_type_exit_with_2(folder, capsys, argv, parts):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [part for part in parts if part not in err] == [], err


BROKEN_CONFIGS = {
    "no function": ("x = 1\n", ("bad.py", "config()")),
    "another result": ("def config():\n    return 3\n", ("bad.py", "int", "RunConfig")),
    "not Python": ("def config(:\n", ("bad.py:1", "not valid Python")),
    "an unknown field": (
        "from moejax.config import ModelConfig\n\ndef config():\n    return ModelConfig(num_exprts=2)\n",
        ("bad.py:4", "num_exprts", "nearest field is num_experts"),
    ),
    "a refused value": ("from moejax.config import ModelConfig\n\nmodel = ModelConfig(num_heads=7)\n", ("model.num_heads=7",)),
    "its own failure": ("def config():\n    return 1 / 0\n", ("bad.py:2", "ZeroDivisionError")),
    "a missing import": ("import no_such_module\n", ("bad.py:1", "no_such_module")),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_configs_are_named_with_their_line(folder, case):
    text, parts = BROKEN_CONFIGS[case]
    (folder / "configs" / "bad.py").write_text(text)
    with pytest.raises(UserError) as caught:
        parse("configs/bad.py")
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_help_shows_the_config_and_ends_with_an_example(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "A run for tests." in out
    assert "--model.num-experts" in out
    assert "--summary" in out
    assert out.rstrip().splitlines()[-1].split()[:3] == ["python", "train.py", "configs/small.py"]


def test_parse_of_another_dataclass():
    @dataclass(frozen=True)
    class Options:
        prompt: str = ""
        ignore_eos: bool = False

    assert cli.parse(["--prompt", "x", "--ignore-eos"], Options()) == Options("x", True)
    assert cli.parse(["--no-ignore-eos"], Options(ignore_eos=True)) == Options()
    with pytest.raises(UserError, match=r"--promt.*--prompt"):
        cli.parse(["--promt", "x"], Options())


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [(UserError("this is wrong"), 2, "error: this is wrong\n"), (KeyboardInterrupt(), 130, "\ninterrupted\n")],
    ids=["UserError", "KeyboardInterrupt"],
)
def test_run_command_says_it_in_one_line(capsys, raised, status, said):
    def main(argv):
        raise raised

    with pytest.raises(SystemExit) as caught:
        cli.run_command(main)
    assert caught.value.code == status
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("status", [None, 0, 3])
def test_run_command_exits_with_the_status_of_main(status):
    with pytest.raises(SystemExit) as caught:
        cli.run_command(lambda argv: status)
    assert (caught.value.code or 0) == (status or 0)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_command(lambda argv: 1 // 0)


def test_as_a_command(folder):
    good = run_command(["python", "program.py", "--train.steps", "7", "--summary"], cwd=folder)
    assert (good.returncode, good.stdout, good.stderr) == (0, "small 7 configs/small.py --summary\n", "")
    bad = run_command(["python", "program.py", "--model.num-heads", "7"], cwd=folder)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert bad.stderr.startswith("error: model.num_heads=7")


@pytest.mark.parametrize(
    "argv", [["--help"], ["--model.num-exprts", "4"], ["--model.num-heads", "7"], ["--train.steps", "many"]], ids=" ".join
)
def test_jax_is_not_imported_before_the_configuration_is_valid(folder, argv):
    code = f"""import sys
sys.argv = ["program.py", *{argv!r}]
try:
    exec(open("program.py").read())
except SystemExit as end:
    print(end.code, "jax" in sys.modules)
"""
    result = run_command(["python", "-c", code], cwd=folder)
    assert result.stdout.splitlines()[-1] == f"{0 if argv == ['--help'] else 2} False", result.stdout + result.stderr


def test_a_reader_that_leaves_is_no_error(folder):
    script = "from moejax.cli import run_command\nrun_command(lambda argv: print('line\\n' * 200_000))"
    result = run_command(["bash", "-c", f'"{sys.executable}" -c "$0" | head -n 1; echo "${{PIPESTATUS[0]}}"', script], cwd=folder)
    assert result.stdout.splitlines() == ["line", "141"]
    assert result.stderr == ""


FLAGS_WITH_VALUES = {"--plan TOPOLOGY": "where", "--plan-search [SECONDS]": "how long"}


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--plan", "v5p:2x2x2"], {"--plan": "v5p:2x2x2"}),
        (["--plan=v5p:2x2x2", "--train.steps", "3"], {"--plan": "v5p:2x2x2"}),
        (["--plan", "local", "--plan-search", "configs/small.py"], {"--plan": "local", "--plan-search": ""}),
        (["--plan-search", "--plan", "local"], {"--plan": "local", "--plan-search": ""}),
        (["--plan-search", "20", "--plan", "local"], {"--plan": "local", "--plan-search": "20"}),
    ],
)
def test_flags_of_the_command_with_values(folder, argv, values):
    assert cli.parse_run(argv, "configs/small.py", FLAGS_WITH_VALUES).values == values


@pytest.mark.parametrize("argv", [["--plan"], ["--plan", "--train.steps", "3"]])
def test_a_flag_without_its_value_says_what_is_missing(folder, argv):
    with pytest.raises(UserError, match="--plan needs a value; give --plan TOPOLOGY"):
        cli.parse_run(argv, "configs/small.py", FLAGS_WITH_VALUES)
