"""Mixtral 8x7B: 32 layers of 8 experts, 2 per token, as published.

    python train.py configs/mixtral_8x7b.py --summary

prints the parameters by kind of module, 46,702,792,704 in all and 12,879,925,248 active per token, and allocates nothing; it takes
seconds. In bfloat16, as published, the weights are 93.4 GB. Trained as set here, with float32 master weights, gradients and the
two moments of AdamW, they take 0.75 TB over all devices, activations not counted: training it needs a cluster, and text and
a tokenizer of its own (`--data.path`, `--data.tokenizer`). Optimiser settings are a place to start from, not a published recipe.
"""

from __future__ import annotations

import dataclasses

from moejax.config import DataConfig, RunConfig, TrainConfig
from moejax.families.mixtral import MIXTRAL_8X7B


def config() -> RunConfig:
    """The run: the published sizes, rows of 4,096 tokens, bfloat16 compute over float32 weights."""
    return RunConfig(
        name="mixtral_8x7b",
        model=dataclasses.replace(MIXTRAL_8X7B, param_dtype="float32", remat="full"),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(
            steps=100_000,
            batch_size=1024,
            optimizer="adamw",
            learning_rate=1e-4,
            warmup_steps=2000,
            final_learning_rate_fraction=0.1,
            save_every=1000,
        ),
    )
