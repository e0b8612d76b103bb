"""A small Arctic-style hybrid that finds a number in filler: what the longer texts of docs/inference.md are measured with.

    python train.py configs/passkey.py
    python -m moejax.evals passkey --checkpoint runs/passkey --lengths 128 256 512 1024 --scalings none linear:4 dynamic:4 yarn:4

PARAMETERS: 3 layers of 4 experts, top-2, beside a dense residual; rows of 256 tokens, and max_length says so. Its text is generated
(`moejax/data/passkey.py`): keys of five different digits, asked for three times a document. Copying is learned all at once: TIMES.
"""

from moejax.config import DataConfig, Domain, ModelConfig, RunConfig, SampleConfig, TrainConfig


def config() -> RunConfig:
    """The run: 3 layers of 4 experts beside a dense residual, short rows of generated text."""
    return RunConfig(
        name="passkey",
        model=ModelConfig(
            family="arctic",
            vocab_size=512,
            hidden_size=128,
            intermediate_size=128,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            num_experts=4,
            experts_per_token=2,
            max_length=256,
            residual_mlp=True,
            scan_layers=False,  # three layers compile quickly one by one
        ),
        data=DataConfig(domains=(Domain("passkey", "builtin:passkey", max_megabytes=4.0),), sequence_length=256),
        train=TrainConfig(
            steps=700,
            batch_size=8,
            optimizer="muon",
            learning_rate=0.02,
            adam_learning_rate=0.006,
            warmup_steps=20,
            log_every=20,
            eval_every=100,
            eval_kilobytes=50.0,
        ),
        sample=SampleConfig(prompt="The pass key is"),
    )
