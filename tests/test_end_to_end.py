"""train.py and sample.py as a user runs them: a run from its first step to its samples, stopped, resumed, and misused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint import store
from moejax.data.text import train_tokenizer
from tests.conftest import ROOT, SHORT_RUN, run_command, write_text

TRAIN, SAMPLE = ROOT / "train.py", ROOT / "sample.py"
OVERRIDES = "--train.steps 20 --train.save-every 5 --train.log-every 1 --train.batch-size 4".split()
SMALL = [*SHORT_RUN, "--model.num-layers", "1", "--data.sequence-length", "32", "--sample.max-new-tokens", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with some text to train on."""
    folder = tmp_path_factory.mktemp("place")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Every command here compiles the same programs; the first one's are kept for the others."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def training(directory: str) -> list[str | Path]:
    """The command, the config's path amidst the flags."""
    config = ROOT / "configs" / "tiny.py"
    return ["python", TRAIN, *OVERRIDES[:4], config, "--run-dir", directory, *OVERRIDES[4:], *SMALL]


@pytest.fixture(scope="module")
def run(place, environment) -> subprocess.CompletedProcess:
    """A run from start to end, in runs/straight."""
    return run_command(training("runs/straight"), cwd=place, **environment)


def read_rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_losses(directory: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(directory) if "loss" in row]


def final_parameters(directory: Path) -> list[np.ndarray]:
    import jax

    newest = store.latest_step(directory)
    assert newest is not None
    metadata = store.read_metadata(newest)
    assert metadata.step == 20
    return [np.asarray(leaf) for leaf in jax.tree.leaves(store.restore_params(newest, metadata.config))]


# -- training -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should(run, place):
    assert run.returncode == 0, run.stderr
    directory = place / "runs" / "straight"
    assert [path.name for path in store.list_steps(directory)] == ["00000015", "00000020"]
    assert {"config.json", "metrics.jsonl", "tokenizer.model", "checkpoints", "curriculum.png"} <= {
        path.name for path in directory.iterdir()
    }
    *rows, evaluation = read_rows(directory)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["tokens"] == 20 * 4 * 32
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert (evaluation["step"], evaluation["domain"]) == (20, "text")
    assert 0 < evaluation["eval_bits_per_byte"] < 8


def test_a_run_shows_its_progress_its_evaluation_and_a_sample(run):
    lines = run.stdout.splitlines()
    assert sum(line.startswith("step ") and "loss" in line for line in lines) == 20
    assert any("tokens/s" in line and "ETA" in line for line in lines)
    assert any(line.split()[:1] == ["text"] and "gzip -9" in line for line in lines)
    assert 'python sample.py --checkpoint runs/straight --prompt "def read_"' in run.stdout
    assert run.stderr == ""


def test_a_finished_run_says_so_and_is_left_as_it_is(run, place, environment):
    before = read_rows(place / "runs" / "straight")
    again = run_command(training("runs/straight"), cwd=place, **environment)
    assert again.returncode == 0, again.stderr
    assert "runs/straight is done: it has trained for 20 steps" in again.stdout
    assert not any(line.startswith("step ") for line in again.stdout.splitlines())
    assert read_rows(place / "runs" / "straight") == before


def start_and_signal(place, environment, directory: str, step: int, number: int) -> tuple[int, str, str]:
    """Starts training and sends a signal once the checkpoint of `step` is complete; (status, stdout, stderr)."""
    words = [sys.executable, *map(str, training(directory)[1:])]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    variables.pop("JAX_NUMPY_RANK_PROMOTION", None)
    variables.pop("XLA_FLAGS", None)
    with subprocess.Popen(words, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (place / directory / "checkpoints" / f"{step:08d}" / "moejax.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, "it ended before it was stopped"
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_run_that_was_killed_and_interrupted_is_the_run_that_was_not(run, place, environment):
    directory = place / "runs" / "stopped"
    status, _, _ = start_and_signal(place, environment, "runs/stopped", 5, signal.SIGKILL)
    assert status == -signal.SIGKILL
    status, out, err = start_and_signal(place, environment, "runs/stopped", 10, signal.SIGTERM)
    assert status == 130, err
    assert "resuming runs/stopped at step 5" in out
    assert err.split() == ["interrupted"]
    assert "saving step" in out.splitlines()[-1]
    last = run_command(training("runs/stopped"), cwd=place, **environment)
    assert last.returncode == 0, last.stderr
    assert read_losses(directory) == read_losses(place / "runs" / "straight")
    straight = final_parameters(place / "runs" / "straight")
    assert all(np.array_equal(a, b) for a, b in zip(final_parameters(directory), straight, strict=True))


@pytest.mark.parametrize(
    ("blocks", "what"),
    [(48, "no room to save"), (4, "no room to write in the run directory")],
    ids=["checkpoint", "metrics"],
)
@pytest.mark.slow
def test_a_disk_that_fills_leaves_the_last_good_checkpoint(run, place, environment, blocks, what):
    """Files may grow to `blocks` KiB: more than metrics.jsonl in the first case, less in the second."""
    name = f"runs/full-{blocks}"
    shutil.copytree(place / "runs" / "straight", place / name)
    words = [sys.executable, *training(name)[1:], "--train.steps", "24", "--train.save-every", "2"]
    no_writing = {**environment, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    result = run_command(["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", *words], cwd=place, **no_writing)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {what}")
    assert result.stderr.count("\n") == 1, result.stderr
    assert name in result.stderr
    assert sorted(path.name for path in (place / name / "checkpoints").iterdir()) == ["00000015", "00000020"]
    assert final_parameters(place / name)


@pytest.mark.slow
def test_the_command_of_the_readme_on_the_text_of_this_machine(tmp_path):
    words = ["python", TRAIN, ROOT / "configs" / "tiny.py", "--run-dir", "DIR", *OVERRIDES, "--model.num-experts", "4"]
    result = run_command(words, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    *rows, prose, code, sql = read_rows(tmp_path / "DIR")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["domain"] for row in (prose, code, sql)] == ["prose", "code", "sql"]


@pytest.mark.parametrize("config", ["tiny", "arctic_480b"])
def test_a_summary_counts_and_trains_nothing(tmp_path, config):
    result = run_command(["python", TRAIN, ROOT / "configs" / f"{config}.py", "--summary"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "experts" in result.stdout
    if config == "arctic_480b":
        assert "478,584,608,768" in result.stdout
        assert "17,318,647,808" in result.stdout
    assert list(tmp_path.iterdir()) == []


# -- sampling -----------------------------------------------------------------------------------------------------------


def sample(place, environment, *arguments: str) -> subprocess.CompletedProcess:
    result = run_command(["python", SAMPLE, "--max-new-tokens", "12", "--ignore-eos", *arguments], cwd=place, **environment)
    assert result.returncode == 0, result.stderr
    return result


def test_samples_are_text_and_nothing_else(run, place, environment):
    first = sample(place, environment, "--checkpoint", "runs/straight", "--prompt", "the model")
    assert first.stdout.startswith("the model")
    assert len(first.stdout) > len("the model\n")
    assert "loaded" not in first.stdout and "tokens/s" not in first.stdout
    assert "runs/straight" in first.stderr and "tokens/s" in first.stderr
    step = sample(place, environment, "--checkpoint", "runs/straight/checkpoints/00000020", "--prompt", "the model")
    assert step.stdout == first.stdout
    other = sample(place, environment, "--checkpoint", "runs/straight", "--prompt", "the model", "--seed", "7")
    assert other.stdout != first.stdout


@pytest.mark.slow
def test_a_file_of_prompts_is_answered_line_by_line(run, place, environment, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "the model"}\n{"tokens": [5, 6], "max_new_tokens": 3, "logprobs": 1}\n')
    files = ("--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"))
    result = sample(place, environment, "--checkpoint", "runs/straight", "--min-p", "0.01", "--stop", "zzz", "yyy", *files)
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (len(first["tokens"]), len(second["tokens"]), len(second["logprobs"])) == (12, 3, 3)
    assert result.stdout == ""
    assert "2/2 prompts, 15 tokens" in result.stderr


@pytest.mark.slow
def test_a_text_without_end_ends_with_ctrl_c(run, place, environment):
    """It goes past its cache of 20 tokens, and past the model's positions."""
    flags = "--checkpoint runs/straight --stream-forever --cache.kind sinks --cache.window 16 --prompt the".split()
    command = [sys.executable, SAMPLE, *flags]
    process = subprocess.Popen(command, cwd=place, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    text = b""
    while len(text) < 10_000:
        piece = process.stdout.read1()
        assert piece, process.communicate()
        text += piece
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert text.startswith(b"the") and (text + rest).endswith(b"\n")
    assert b"tokens/s" in told and b"Traceback" not in told


def test_the_newest_run_is_sampled_from(run, place, environment, tmp_path):
    shutil.copytree(place / "runs" / "straight", tmp_path / "runs" / "older")
    shutil.copytree(place / "runs" / "straight", tmp_path / "runs" / "newer")
    (tmp_path / "runs" / "unfinished").mkdir()
    for name, seconds in (("newer", 2_000_000_000), ("older", 1_000_000_000)):
        for path in store.list_steps(tmp_path / "runs" / name):
            os.utime(path, (seconds, seconds))
    result = sample(tmp_path, environment, "--temperature", "0")
    assert "runs/newer" in result.stderr
    assert result.stdout.startswith("def read_")


def test_a_published_model_without_tokenizer_says_what_it_lacks(golden, tmp_path):
    result = run_command(["python", SAMPLE, "--checkpoint", golden("mixtral_hf").directory], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "no tokenizer" in result.stderr
    assert "Traceback" not in result.stderr


# -- mistakes -----------------------------------------------------------------------------------------------------------

# Runs a program once for each list of arguments, in one process to save its start; says how each ended and how far jax got.
MISUSE = """import contextlib, io, json, runpy, sys, traceback

program, cases = sys.argv[1], json.loads(sys.argv[2])
results = []
for arguments in cases:
    sys.argv = [program, *arguments]
    out, err, status = io.StringIO(), io.StringIO(), "none"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
    bridge = sys.modules.get("jax._src.xla_bridge")
    imported, started = "jax" in sys.modules, bridge is not None and bridge.backends_are_initialized()
    results.append({"status": status, "out": out.getvalue(), "err": err.getvalue(), "imported": imported, "started": started})
print(json.dumps(results))
"""


def misuse(program: Path, cases: dict[str, tuple[list[str], tuple[str, ...]]], cwd: Path) -> dict[str, dict]:
    arguments = json.dumps([arguments for arguments, _ in cases.values()])
    result = run_command(["python", "-c", MISUSE, program, arguments], cwd=cwd)
    assert result.returncode == 0, result.stderr
    return dict(zip(cases, json.loads(result.stdout.splitlines()[-1]), strict=True))


# What is wrong with the configuration alone, answered before jax is imported: arguments -> what the message holds.
CONFIGURATIONS = {
    "unknown field": (["--model.num-exprts", "4"], ("--model.num-exprts", "--model.num-experts")),
    "wrong type": (["--train.steps", "many"], ("--train.steps", "many", "INT")),
    "a fraction in a config file": (["fraction.py"], ("model.num_layers=2.5", "float", "whole number", "--model.num-layers")),
    "a text in a config file": (["text.py"], ("model.num_experts='8'", "str", "whole number", "--model.num-experts")),
    "heads that do not divide": (["--model.num-heads", "7"], ("model.num_heads=7", "model.hidden_size=128", "1, 2, 4, 8")),
    "top-k above the experts": (["--model.experts-per-token", "9"], ("model.experts_per_token=9", "model.num_experts=8", "1 to 8")),
    "no such config": (["configs/tny.py"], ("configs/tny.py", "tiny.py")),
}
# What is wrong with what the configuration points to: before any device is touched.
PLACES = {
    "a family that is none": (["--model.family", "mixtrl"], ("model.family='mixtrl'", "did you mean 'mixtral'")),
    "a run of a different model": (
        ["--run-dir", "begun", "--model.num-layers", "9"],
        ("begun", "model.num_layers was 2 and is now 9", "--run-dir"),
    ),
    "no text found": (["--run-dir", "new", "--data.path", "empty"], ("no text found", "'empty'", "--data.path")),
    "no such text": (["--run-dir", "new", "--data.path", "nowhere"], ("'nowhere'", "does not exist")),
    "a tokenizer that is too large": (
        ["--run-dir", "new", "--data.path", "text.txt", "--data.tokenizer", "tokenizer/tokenizer.model", "--model.vocab-size", "280"],
        ("data.tokenizer='tokenizer/tokenizer.model'", "300 pieces", "model.vocab_size=280", "--model.vocab-size 300"),
    ),
    "a run directory that cannot be written": (["--run-dir", "text.txt/run"], ("text.txt/run", "cannot write", "--run-dir")),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> dict[str, dict]:
    """How train.py ended for every case above."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, value in (("fraction", "num_layers=2.5"), ("text", 'num_experts="8"')):
        (folder / f"{name}.py").write_text(
            f"from moejax.config import ModelConfig, RunConfig\n\ndef config():\n    return RunConfig(model=ModelConfig({value}))\n"
        )
    (folder / "empty").mkdir()
    text = "the router sends a token to an expert, and def read(path): return path\n" * 50
    (folder / "text.txt").write_text(text)
    train_tokenizer([text + "".join(map(chr, range(0x4E00, 0x4E80))) * 4], 300).save(folder / "tokenizer")
    from moejax.config import ModelConfig, RunConfig
    from moejax.training.run_directory import claim_run_directory

    directory = claim_run_directory(RunConfig(run_dir=str(folder / "begun"), model=ModelConfig(num_layers=2)))
    (directory / "checkpoints").mkdir()
    return misuse(TRAIN, CONFIGURATIONS | PLACES, folder)


@pytest.mark.parametrize("case", [*CONFIGURATIONS, *PLACES])
def test_a_mistake_is_one_message_before_any_device_is_touched(mistakes, case):
    ended, parts = mistakes[case], (CONFIGURATIONS | PLACES)[case][1]
    assert ended["status"] == 2, ended["err"]
    assert [part for part in parts if part not in ended["err"]] == [], ended["err"]
    assert "Traceback" not in ended["err"]
    assert case == "wrong type" or (ended["err"].startswith("error: ") and ended["err"].count("\n") == 1)
    assert not ended["started"]
    assert case in PLACES or not ended["imported"]


# Meshes that cannot be: the devices must be asked, but no text is read.
MESHES = {
    "more devices than there are": (
        ["--mesh.expert", "4", "--mesh.fsdp", "1"],
        ("mesh expert=4 takes 4 devices, but there are 1", "to -1"),
    ),
    "two axes left over": (["--mesh.stage", "-1", "--mesh.fsdp", "-1"], ("mesh axes fsdp and stage are both -1",)),
}


def test_a_mesh_that_cannot_be_is_one_message(tmp_path):
    ended = misuse(TRAIN, MESHES, tmp_path)
    for case, (_, parts) in MESHES.items():
        assert ended[case]["status"] == 2, ended[case]["err"]
        assert [part for part in parts if part not in ended[case]["err"]] == [], ended[case]["err"]
        assert ended[case]["err"].startswith("error: ") and ended[case]["err"].count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def hf_config(**changes) -> str:
    values = json.loads((ROOT / "tests" / "golden" / "mixtral_hf" / "config.json").read_text())
    return json.dumps(values | changes)


def quantised(method: str) -> dict[str, str]:
    return {"config.json": hf_config(quantization_config={"quant_method": method}), "model.safetensors": ""}


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
# Directories that sample.py cannot read: name -> (files, what the message holds).
CHECKPOINTS = {
    "nothing": ({}, ("holds no checkpoint", "moejax.json", "config.json")),
    "something-else": ({"notes.txt": "hello"}, ("holds no checkpoint", "notes.txt")),
    "run-without-checkpoint": ({"checkpoints/.keep": ""}, ("without a complete checkpoint",)),
    "awq": (quantised("awq"), ("AWQ", "original checkpoint")),
    "gptq": (quantised("gptq"), ("GPTQ", "original checkpoint")),
    "bitsandbytes": (quantised("bitsandbytes"), ("bitsandbytes", "original checkpoint")),
    "fp8": (quantised("fp8"), ("FP8", "original checkpoint")),
    "gguf": ({"mixtral.Q4_K_M.gguf": "GGUF"}, ("GGUF", "original checkpoint")),
    "llama": ({"config.json": hf_config(**LLAMA), "model.safetensors": ""}, ("'llama'", "LlamaForCausalLM", "mixtral", "arctic")),
}
SAMPLE_ARGUMENTS = {
    "no run at all": ([], ("no finished run in runs/", "python train.py", "--checkpoint")),
    "missing": (["--checkpoint", "awk"], ("awk does not exist", "did you mean awq")),
    "a file": (["--checkpoint", "something-else/notes.txt"], ("is a file", "expected a directory")),
    "unknown flag": (["--promt", "x"], ("--promt", "--prompt")),
    "negative temperature": (["--temperature", "-1"], ("temperature=-1",)),
    "a bias that is none": (["--logit-bias", "5=1"], ("--logit-bias 5=1", "ID:VALUE")),
    "a cache that never forgets": (["--stream-forever"], ("--stream-forever needs a cache that forgets", "add --cache.kind sinks")),
    "a conversation without end": (["--stream-forever", "--chat"], ("--stream-forever excludes --chat",)),
    "a window of a full cache": (["--cache.window", "5"], ("cache.window=5 says nothing to cache.kind='full'",)),
    "prompts without out": (["--prompts", "in.jsonl"], ("--prompts and --out belong together",)),
    "logprobs of one prompt": (["--logprobs", "2"], ("--logprobs", "add --prompts and --out")),
    "a plan for no such chip": (["--plan", "v9:2x2"], ("--plan v9:2x2", "v5p", "local")),
    "a plan's file without a plan": (["--plan-json", "plan.json"], ("--plan-json plan.json", "add --plan")),
    "a dispatch of no plan": (["--plan-dispatch", "auto"], ("--plan-dispatch auto", "add --plan")),
    "a plan of a prompt": (["--plan", "local", "--prompt", "a"], ("--plan excludes --prompt",)),
    "a plan of no cache": (["--plan", "local", "--plan-context", "0"], ("--plan-context 0 must be at least 1",)),
    "a plan of no such model": (["--plan", "local", "--checkpoint", "awk"], ("--checkpoint awk", "configs/arctic_480b.py")),
    "a plan written nowhere": (["--plan", "local", "--plan-json", "nowhere/plan.json"], ("--plan-json", "no directory nowhere")),
    "a bad line": (
        ["--checkpoint", "something-else", "--prompts", "in.jsonl", "--out", "out.jsonl"],
        ("in.jsonl, line 2", "top_p=2", "at most 1"),
    ),
} | {name: (["--checkpoint", name], parts) for name, (_, parts) in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def wrong_checkpoints(tmp_path_factory) -> dict[str, dict]:
    """How sample.py ended for every case above."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (files, _) in CHECKPOINTS.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).parent.mkdir(exist_ok=True)
            (folder / name / file).write_text(text)
    (folder / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 2}\n')
    return misuse(SAMPLE, SAMPLE_ARGUMENTS, folder)


@pytest.mark.parametrize("case", SAMPLE_ARGUMENTS)
def test_what_cannot_be_sampled_from_is_refused_by_name(wrong_checkpoints, case):
    ended, parts = wrong_checkpoints[case], SAMPLE_ARGUMENTS[case][1]
    assert ended["status"] == 2, ended["err"]
    assert [part for part in parts if part not in ended["err"]] == [], ended["err"]
    assert ended["err"].startswith("error: ") and ended["err"].count("\n") == 1
    assert ended["out"] == ""
    assert not ended["started"]
