"""Fine-tuning: what is taken from the checkpoint, what is refused, and that the run is a run like any other."""

from __future__ import annotations

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
