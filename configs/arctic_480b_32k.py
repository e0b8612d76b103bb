"""Snowflake Arctic, trained at 4,096 tokens, taught to read 32,768: all weights, on long texts, for some hundred steps.

    moejax-convert SRC DIR --verify
    python train.py configs/arctic_480b_32k.py --init-from DIR --mesh.fsdp -1        on all hosts of a v5p-1024 (512 chips)

The length needs training because rotary positions do. At theta 10,000 and heads of 128, 18 of the 64 frequencies do not turn once in
4,096 tokens: past them queries and keys stand at angles that the weights have never met. YaRN (Peng et al. 2023) keeps the frequencies
that turn often, so that near tokens look as before, divides the slow ones by 8, so that 32,768 tokens bring no new angle, and sharpens
attention by 0.1 ln 8 + 1. Its authors took 400 steps of 4 M tokens for Llama 2; by their figures linear scaling needs more, and plain
theta more still (for that, leave `rope_scaling` out of this file). `python -m moejax.evals lengths` and `passkey` say what it gave.

All weights and not an adapter: every head of every layer must learn the new angles. Float32 weights, gradients and AdamW's two moments
are 16 bytes of 478,584,608,768 parameters, 7.66 TB. The mesh divides the experts by 32 x 8 and all else by 8. What a row keeps for the
backward pass (`remat` full: the input of each layer) is 35 x 32,768 x 7,168 x 2 bytes = 16.4 GB, so `mesh.context` divides each row
between 2 chips. Rows on their way to experts have room for twice what an even router sends (`ragged_buffer_factor`): room for the worst
case would be 32 times it, and does not fit; what finds no room is counted in `dropped_tokens`. 256 rows, one for every 2 chips, are 8.4 M
tokens a step and 1.7 G in all. `--plan v5p:8x8x8` compiles this step where no TPU is: 37.0 GB of weights and moments and
57.1 GB of temporaries a chip, when it was last done.

The text is yours. Rows are packed, and a token sees its own document only: what teaches distance are documents of 32,768 tokens and
more (books, repositories, filings with their annexes), which `data/long` is for. A third is the mixture of the last stage, so that what
the model knew stays. None of this has been run at full size; a small model has taken the same steps on eight simulated devices, in the
tests.
"""

from __future__ import annotations

import dataclasses

from moejax.config import DataConfig, Domain, MeshConfig, RopeScaling, RunConfig, Stage, TrainConfig
from moejax.families.arctic import ARCTIC_480B

LENGTH = 32_768
TRAINED = ARCTIC_480B.max_length


def config() -> RunConfig:
    """The run: YaRN by 8, rows of 32,768 tokens, AdamW at a low rate after a short warm-up, no weight decay."""
    return RunConfig(
        name="arctic_480b_32k",
        init_from="",  # to be named with --init-from
        model=dataclasses.replace(
            ARCTIC_480B,
            max_length=LENGTH,
            rope_scaling=RopeScaling(kind="yarn", factor=LENGTH / TRAINED, original_length=TRAINED),
            ragged_buffer_factor=2.0,
            param_dtype="float32",
            remat="full",
        ),
        mesh=MeshConfig(expert=32, context=2, fsdp=-1),
        data=DataConfig(
            domains=(Domain("long", "data/long"), Domain("mixed", "data/mixed")),
            stages=(Stage(None, {"long": 2, "mixed": 1}),),
            sequence_length=LENGTH,
        ),
        train=TrainConfig(
            steps=200,
            batch_size=256,
            optimizer="adamw",
            learning_rate=2e-5,
            warmup_steps=20,
            weight_decay=0.0,
            save_every=50,
        ),
    )
