"""Ctrl-C once waits for what is being written, and twice for nothing."""

from __future__ import annotations

import jax

from moejax.checkpoint import store
from moejax.training.interruption import Agreement

TWICE = """
import os, signal, sys, threading, time
import numpy as np
import jax
from moejax.cli import run_command
from moejax.config import ModelConfig, RunConfig
from moejax.families.layout import abstract_parameters
from moejax.training.interruption import interruption
from moejax.training.saving import Saver
from moejax.training.state import Counters, TrainState

model = ModelConfig(vocab_size=32, hidden_size=16, num_layers=1)
params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_parameters(model))

def write_slowly(folder):
    threading.Thread(target=time.sleep, args=(1000,)).start()  # the interpreter itself would wait for it
    print("writing", flush=True)
    time.sleep(1000)

def main(argv):
    with interruption() as interrupted, Saver(RunConfig(run_dir=argv[0], model=model), write_slowly) as saver:
        saver.save(TrainState(np.int32(5), params, {"m": np.zeros(3)}, Counters(np.int32(0), np.int32(0))))
        time.sleep(float(argv[1]))
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        saver.wait()

run_command(main)
"""


def test_the_second_ctrl_c_waits_for_nothing_and_leaves_nothing(tmp_path, run_command):
    result = run_command(["python", "-c", TWICE, tmp_path / "run", "1"], timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "writing\n", "\ninterrupted\n")
    assert store.list_steps(tmp_path / "run", also_incomplete=True) == []
    assert all(path.name.startswith(".00000005.tmp-") for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_processes_agree_one_step_late_and_settle_at_once(monkeypatch):
    """The same program as with several processes, the devices of this one in the place of theirs."""
    raised: list[int] = []
    alone, together = Agreement(lambda: bool(raised)), Agreement(lambda: bool(raised))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not together() and not together()
    raised.append(15)
    assert not together()  # what is known is the step before
    assert together()
    settling = Agreement(lambda: bool(raised))
    assert settling.settle()
    monkeypatch.undo()
    assert alone()
