"""Goes on training a model that exists: all of its weights, on your own text.

    python train.py configs/finetune.py --init-from DIR --data.path my.jsonl

DIR is whatever `moejax.load` reads: a converted checkpoint, a published one, a run. Sizes, wiring and the dtype of the matmuls are its
own, its tokenizer is used as it is; weights, gradients and the optimiser's two moments are float32 and take 16 bytes a parameter.
my.jsonl has one {"text": ...} a line. docs/finetuning.md says more.
"""

from __future__ import annotations

from moejax.config import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig


def config() -> RunConfig:
    """The run: AdamW at a low rate after a warm-up, no weight decay, rows of up to 1,024 tokens."""
    return RunConfig(
        name="finetune",
        init_from="",  # to be named with --init-from
        model=ModelConfig(remat="full", param_dtype="float32"),  # the rest from the checkpoint
        data=DataConfig(sequence_length=1024),
        train=TrainConfig(
            steps=300,
            batch_size=8,
            optimizer="adamw",
            learning_rate=1e-5,
            warmup_steps=30,
            final_learning_rate_fraction=0.1,
            weight_decay=0.0,
            beta_2=0.999,
            save_every=100,
        ),
        sample=SampleConfig(prompt="The"),
    )
