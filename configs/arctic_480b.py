"""Snowflake Arctic: 35 layers of 128 experts, 2 per token, beside a dense residual MLP.

    python train.py configs/arctic_480b.py --summary

prints the parameters by kind of module, 478,584,608,768 in all and 17,318,647,808 active per token, and allocates nothing; it takes
seconds. In bfloat16, as published, the weights are 957.2 GB. Trained as set here, with float32 master weights, gradients and the
two moments of AdamW, they take 7.66 TB over all devices, activations not counted: training it needs a cluster, and text and
a tokenizer of its own (`--data.path`, `--data.tokenizer`). Optimiser settings are a place to start from, not a published recipe.
"""

from __future__ import annotations

import dataclasses

from moejax.config import DataConfig, RunConfig, TrainConfig
from moejax.families.arctic import ARCTIC_480B


def config() -> RunConfig:
    """The run: the published sizes, rows of 4,096 tokens, bfloat16 compute over float32 weights."""
    return RunConfig(
        name="arctic_480b",
        model=dataclasses.replace(ARCTIC_480B, param_dtype="float32", remat="full"),
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
