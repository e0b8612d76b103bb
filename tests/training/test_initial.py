"""Fine-tuning: what is taken from the checkpoint, what is refused, and that the run is a run like any other."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moejax
from moejax.checkpoint import store
from moejax.config import ModelConfig, UserError
from moejax.data.text import load_tokenizer, train_tokenizer
from moejax.data.tokenizer_files import TokenizerSettings, save_files
from moejax.families.arctic import ARCTIC_480B
from tests.conftest import ROOT, run_command

TEXT = "the router sends every token to two experts, and def read(path): return open(path).read() gives the text\n"
FINETUNE = [ROOT / "configs" / "finetune.py"]
SMALL = [
    *("--train.batch-size", "2", "--data.sequence-length", "32", "--train.eval-kilobytes", "0.3", "--train.warmup-steps", "2"),
    *("--sample.max-new-tokens", "4", "--train.learning-rate", "0.003", "--train.log-every", "1"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, golden) -> Path:
    """A working directory with text, a published checkpoint with a chat tokenizer, one of ours in bfloat16, and faulty ones."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": TEXT * 3 + str(number)}) + "\n" for number in range(12)))
    (folder / "text").mkdir()
    shutil.copy(folder / "my.jsonl", folder / "text")
    tokenizer = train_tokenizer([TEXT * 20], 290)
    published = folder / "published"
    published.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(golden("mixtral_hf").directory / file, published / file)
    shutil.copytree(published, folder / "mute")
    save_files(published, "tokenizer.model", tokenizer.model_bytes, TokenizerSettings(chat_format="mistral-v1"))
    (published / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (published / "chat_template.jinja").write_text("[INST]")
    model, variables, _ = moejax.load(published, dtype="bfloat16")
    moejax.save(folder / "halves", model, variables, tokenizer)
    train_tokenizer([TEXT * 20 + "".join(map(chr, range(0x400, 0x4FF))) * 9], 330).save(folder / "other")
    shutil.copytree(folder / "mute", folder / "overfull")
    shutil.copy(folder / "other" / "tokenizer.model", folder / "overfull")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def train(place, monkeypatch):
    """train.py's main in this process, in the place above."""
    import train as module

    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda *words: module.main([str(word) for word in words])


def parameters(directory: Path):
    metadata = store.read_metadata(directory)
    return metadata.config, store.restore_params(directory, metadata.config)


def largest_difference(one, other) -> float:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.slow
def test_the_command_of_the_documents_from_a_published_checkpoint_and_on(place, tmp_path):
    from moejax.cli import parse_run
    from moejax.training.initial import complete_config

    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = ["python", ROOT / "train.py", *FINETUNE, "--init-from", "published", "--data.path", "my.jsonl", *SMALL]
    result = run_command([*words, "--train.steps", "4"], cwd=place, **cache)
    assert result.returncode == 0, result.stderr
    run = place / "runs" / "finetune"
    newest = run / "checkpoints" / "00000004"
    carried = {"tokenizer.model", "tokenizer_settings.json", "generation_config.json", "chat_template.jinja"}
    assert carried <= {file.name for file in run.iterdir()} & {file.name for file in newest.iterdir()}
    assert load_tokenizer(run).model_bytes == load_tokenizer(place / "published").model_bytes
    assert load_tokenizer(newest).chat([{"role": "user", "content": "read"}])
    config, trained = parameters(newest)
    before, variables, _ = moejax.load(place / "published")
    assert (config.num_layers, config.num_experts, config.eos_token_ids, config.family) == (2, 8, (2, 7), "mixtral")
    assert config.rope_theta == before.config.rope_theta == 1e6
    assert 0 < largest_difference(trained, variables["params"]) < 0.05  # a few small steps away from where it began
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert losses[-1] < losses[0]

    # It goes on by itself, even where the checkpoint it began with is gone, or is named no more.
    gone = [word.replace("published", "gone") if isinstance(word, str) else word for word in words]
    again = run_command([*gone, "--train.steps", "6"], cwd=place, **cache)
    assert again.returncode == 0, again.stderr
    assert "resuming runs/finetune at step 4" in again.stdout
    assert "gone is not read again" in again.stdout
    assert [path.name for path in store.list_steps(run)] == ["00000004", "00000006"]
    unnamed = parse_run(["--run-dir", str(run)], FINETUNE[0], complete=complete_config).config
    assert (unnamed.model, unnamed.init_from) == (config, "gone")


def test_the_first_state_is_the_checkpoint_in_float32(place, train, monkeypatch):
    """Weights of bfloat16 become float32 masters; the matmuls stay in bfloat16."""
    from moejax.training.loop import Trainer

    seen = {}

    def stop(self, state):
        seen.update(config=self.config, state=state)
        raise UserError("seen")

    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(UserError, match="seen"):
        train(*FINETUNE, "--init-from", "halves", "--data.path", "my.jsonl", "--run-dir", "runs/halves", *SMALL)
    assert (seen["config"].model.param_dtype, seen["config"].model.dtype) == ("float32", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(seen["state"].params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(seen["state"].optimizer_state) if leaf.ndim} == {"float32"}
    _, variables, _ = moejax.load(place / "halves")
    assert largest_difference(seen["state"].params, jax.tree.map(lambda leaf: leaf.astype("float32"), variables["params"])) == 0
    assert int(seen["state"].step) == 0
    with pytest.raises(UserError, match="seen"):
        train(*FINETUNE, "--init-from", "halves", "--data.path", "my.jsonl", "--run-dir", "runs/apart", "--no-model.scan-layers", *SMALL)
    assert len(jax.tree.leaves(seen["state"].params)) > len(jax.tree.leaves(variables["params"]))


TEXTS = ["--data.path", "my.jsonl", "--run-dir", "runs/none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*FINETUNE, *TEXTS], r"--init-from DIRECTORY"),
        ([*FINETUNE, "--init-from", "publishd", *TEXTS], r"init_from='publishd': publishd does not exist; did you mean published"),
        ([*FINETUNE, "--init-from=empty", *TEXTS], r"init_from='empty': empty holds no checkpoint"),
        ([*FINETUNE, "--init-from", "mute", *TEXTS], r"init_from='mute' has no tokenizer beside its weights.*--data\.tokenizer"),
        ([*FINETUNE, "--init-from", "overfull", *TEXTS], r"'overfull' has 330 pieces but its model's vocabulary has 300"),
        ([*FINETUNE, "--init-from", "published", "--data.tokenizer", "other", *TEXTS], r"'other' is another than the one of"),
        ([*FINETUNE, "--init-from", "published", "--model.num-layers", "4", *TEXTS], r"model\.num_layers is 4 and there 2"),
        ([*FINETUNE, "--init-from", "published", "--data.sequence-length", "129", *TEXTS], r"=129 is longer than model\.max_length=128"),
        (["--init-from", "published", *TEXTS], r"another model than this run's: model\.family is 'arctic' and there 'mixtral'"),
        ([*FINETUNE, "--init-form", "published", *TEXTS], r"unknown flag --init-form; the nearest is --init-from"),
    ],
)
def test_mistakes_leave_nothing_behind(place, train, words, message):
    with pytest.raises(UserError, match=message):
        train(*words)
    assert not (place / "runs" / "none").exists()


def test_a_tokenizer_may_be_named_where_the_checkpoint_has_none(place, train):
    from moejax.cli import parse_run
    from moejax.training.initial import complete_config, find_start

    words = ["--run-dir", "runs/named", "--init-from", "mute", "--data.tokenizer", "published/tokenizer.model"]
    config = parse_run(words, FINETUNE[0], complete=complete_config).config
    start = find_start(config)
    assert start is not None and start.tokenizer.vocab_size == load_tokenizer(place / "published").vocab_size
    assert config.data.sequence_length == 128  # what the model is meant for, and not the 1,024 of the config
    assert config.model == ModelConfig(**{**vars(start.model), "remat": "full"})


def test_a_summary_is_that_of_the_checkpoint(place, train, capsys):
    train(*FINETUNE, "--init-from", "published", "--summary")
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(moejax.load(place / 'published')[1])):,}" in capsys.readouterr().out


# -- weights of our own checkpoints ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(place) -> Path:
    """A run of another kind, with two checkpoints, optimiser and all; its weights are those of `halves` plus its step."""
    from moejax.data.text import find_tokenizer

    metadata, (_, weights) = store.read_metadata(place / "halves"), parameters(place / "halves")
    tokenizer = find_tokenizer(place / "halves")
    run = place / "runs" / "begun"
    for step in (20, 40):
        moved = jax.tree.map(lambda leaf, step=step: leaf + step, weights)
        store.save(
            store.step_directory(run, step),
            *(moved, metadata.config),
            optimizer={"m": np.full(9, step)},
            step=step,
            rows_read=8 * step,
            run={"init_from": "elsewhere", "train": {"seed": 5}},
            write_extra=lambda folder: tokenizer.save(folder),
        )
    return run


@pytest.fixture
def first_state(train, monkeypatch):
    """A function: the state, the saver and the first batch's number of a run that begins."""
    from moejax.training.loop import Trainer

    seen = {}

    def stop(self, state):
        seen.update(state=state, saver=self.saver)
        raise UserError("seen")

    def begin(*words):
        monkeypatch.setattr(Trainer, "run", stop)
        with pytest.raises(UserError, match="seen"):
            train(*FINETUNE, "--data.path", "my.jsonl", *SMALL, *words)
        return seen["state"], seen["saver"]

    return begin


@pytest.mark.parametrize(("name", "step"), [("runs/begun", 40), ("runs/begun/checkpoints/00000020", 20), ("halves", 0)])
def test_weights_and_nothing_but_weights_come_along(place, begun, first_state, tmp_path, name, step):
    state, saver = first_state("--init-from", name, "--run-dir", tmp_path / "run")
    _, weights = parameters(place / "halves")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf + step).astype("float32"), weights)
    assert largest_difference(state.params, expected) == 0
    assert int(state.step) == 0 and saver.first_batch(0) == 0  # neither its steps nor its place in the data
    assert {float(np.abs(leaf).max()) for leaf in jax.tree.leaves(state.optimizer_state)} == {0.0}  # nor its moments and counts


def test_damaged_weights_are_named_and_the_ones_before_may_be(place, begun, train, first_state, tmp_path):
    shutil.copytree(begun, tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "00000040"
    victim = max((path for path in (newest / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    words = [*FINETUNE, "--data.path", "my.jsonl", *SMALL, "--run-dir", tmp_path / "run", "--init-from", tmp_path / "damaged"]
    with pytest.raises(UserError, match=rf"{victim.name} is truncated: .*; use another copy of the checkpoint, or another checkpoint"):
        train(*words)
    state, _ = first_state("--run-dir", tmp_path / "run", "--init-from", newest.with_name("00000020"))
    assert int(state.step) == 0


def test_a_run_that_goes_on_takes_its_sizes_from_a_checkpoint_that_can_be_read(place, begun, tmp_path):
    from moejax.cli import parse_run
    from moejax.training.initial import complete_config

    shutil.copytree(begun, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "00000040" / "moejax.json"
    path.write_text(path.read_text().replace('"step": 40', '"step": 41'))
    config = parse_run(["--run-dir", str(tmp_path / "run")], FINETUNE[0], complete=complete_config).config
    assert (config.model.vocab_size, config.init_from) == (300, "elsewhere")


# -- longer texts ---------------------------------------------------------------------------------------------------------


def test_a_run_may_read_further_than_its_checkpoint(place, train):
    from moejax.cli import parse_run
    from moejax.training.initial import complete_config, find_start

    scaling = ["--model.rope-scaling.kind", "yarn", "--model.rope-scaling.factor", "4", "--model.rope-scaling.original-length", "128"]
    words = ["--init-from", "published", "--run-dir", "runs/longer", "--model.max-length", "512", "--data.sequence-length", "512", *scaling]
    config = parse_run(words, FINETUNE[0], complete=complete_config).config
    start = find_start(config)
    assert start is not None and (start.model.max_length, start.model.rope_scaling.kind) == (128, "none")
    assert (config.model.max_length, config.model.rope_scaling.factor, config.data.sequence_length) == (512, 4.0, 512)


def test_the_32k_config_is_arctic_but_for_how_far_it_reads():
    from moejax.training.initial import _differing_fields

    spec = importlib.util.spec_from_file_location("arctic_480b_32k", ROOT / "configs" / "arctic_480b_32k.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.config()
    assert _differing_fields(config.model, ARCTIC_480B) == []  # so its checkpoint is taken
    scaling = config.model.rope_scaling
    assert config.model.max_length == config.data.sequence_length == scaling.factor * scaling.original_length == 32_768
    assert scaling.original_length == ARCTIC_480B.max_length
    assert "478,584,608,768" in module.__doc__ and f"{478_584_608_768 * 16 / 1e12:.2f} TB" in module.__doc__


def test_a_plan_needs_no_checkpoint_where_the_config_names_sizes(tmp_path, monkeypatch):
    from moejax.cli import load_config
    from moejax.training.initial import complete_config

    monkeypatch.chdir(tmp_path)
    for name in ("arctic_480b_32k", "finetune"):
        config = load_config(ROOT / "configs" / f"{name}.py", ROOT / "configs")[0]
        with pytest.raises(UserError, match="name its checkpoint"):
            complete_config(config)
        if name == "finetune":
            with pytest.raises(UserError, match="name its checkpoint"):
                complete_config(config, needs_weights=False)
        else:
            assert complete_config(config, needs_weights=False) == config


@pytest.mark.slow
def test_the_32k_config_scaled_down_trains_on_eight_devices(place, train, tmp_path):
    """The same file with small sizes: a checkpoint of 64 tokens is taught to read 512, on a mesh that divides rows, experts and weights."""
    from moejax.model.transformer import init_parameters

    sizes = {"vocab_size": 290, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    short = dataclasses.replace(ARCTIC_480B, **sizes, num_experts=4, max_length=64, param_dtype="float32")
    params = init_parameters(moejax.Transformer(short), jax.random.key(0))
    moejax.save(tmp_path / "short", moejax.Transformer(short), {"params": params}, load_tokenizer(place / "published"))
    flags = [word for name, value in sizes.items() for word in (f"--model.{name.replace('_', '-')}", value)]
    flags += ["--model.num-experts", 4, "--model.rope-scaling.original-length", 64, "--model.max-length", 512]
    flags += ["--data.path", "my.jsonl", *SMALL, "--data.sequence-length", 512, "--train.batch-size", 8, "--train.steps", 2]
    mesh = ["--mesh.expert", 2, "--mesh.context", 2]
    words = [ROOT / "configs" / "arctic_480b_32k.py", "--init-from", tmp_path / "short", "--run-dir", tmp_path / "run"]
    train(*words, *flags, *mesh)
    config, trained = parameters(tmp_path / "run" / "checkpoints" / "00000002")
    assert (config.max_length, config.rope_scaling.kind, config.rope_scaling.factor) == (512, "yarn", 8.0)
    assert 0 < largest_difference(trained, params) < 0.05
