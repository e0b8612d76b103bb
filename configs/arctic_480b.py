"""Snowflake Arctic: 35 layers of 128 experts, 2 per token, beside a dense residual MLP; 3.5T tokens in three stages.

    python train.py configs/arctic_480b.py --summary
    python train.py configs/arctic_480b.py --data-plan

The first prints the parameters by kind of module, 478,584,608,768 in all and 17,318,647,808 active per token, the second what is read
when; both allocate nothing and take seconds. In bfloat16, as published, the weights are 957.2 GB. Trained as set here, with float32
master weights, gradients and the two moments of AdamW, they take 7.66 TB over all devices, activations not counted: training it needs
a cluster, and a tokenizer of its own (`--data.tokenizer`).

The text is yours: put it where the domains point (a directory of .jsonl, .jsonl.zst or .parquet files each), or point them elsewhere.
Published of the curriculum are the tokens of its stages, 1T, 1.5T and 1T, and their sense: generic skills first, then two
stages weighted towards enterprise skills, code and SQL. The shares of the domains, and the domains, are ours: a place to start
from. So are the optimiser's settings. Batches are 1,024 rows of 4,096 tokens, 834,466 steps in all.
"""

from __future__ import annotations

import dataclasses

from moejax.config import DataConfig, Domain, MeshConfig, RunConfig, Stage, TrainConfig
from moejax.families.arctic import ARCTIC_480B


def config() -> RunConfig:
    """The run: the published sizes, three stages, rows of 4,096 tokens, bfloat16 compute over float32 weights."""
    return RunConfig(
        name="arctic_480b",
        model=dataclasses.replace(ARCTIC_480B, dispatch="capacity", param_dtype="float32", remat="full"),
        mesh=MeshConfig(expert=128, fsdp=-1),
        data=DataConfig(
            domains=(
                Domain("web", "data/web"),
                Domain("books", "data/books"),
                Domain("science", "data/science"),  # papers, mathematics
                Domain("code", "data/code"),
                Domain("sql", "data/sql"),  # queries, schemas, questions with their queries
                Domain("enterprise", "data/enterprise"),  # manuals, filings, instructions
            ),
            stages=(
                Stage(1_000_000_000_000, {"web": 0.75, "books": 0.08, "science": 0.06, "code": 0.10, "sql": 0.005, "enterprise": 0.005}),
                Stage(1_500_000_000_000, {"web": 0.48, "books": 0.06, "science": 0.10, "code": 0.28, "sql": 0.03, "enterprise": 0.05}),
                Stage(1_000_000_000_000, {"web": 0.25, "books": 0.05, "science": 0.12, "code": 0.40, "sql": 0.08, "enterprise": 0.10}),
            ),
            sequence_length=4096,
        ),
        train=TrainConfig(
            batch_size=1024,
            optimizer="adamw",
            learning_rate=1e-4,
            warmup_steps=2000,
            final_learning_rate_fraction=0.1,
            save_every=1000,
        ),
    )
