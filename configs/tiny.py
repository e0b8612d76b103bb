"""A small Arctic-style hybrid on text that every machine has.

python train.py
"""

from moejax.config import DataConfig, Domain, ModelConfig, RunConfig, SampleConfig, TrainConfig


def config() -> RunConfig:
    """The run: 3 M parameters, 4 layers of 8 experts beside a dense residual."""
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            family="arctic",
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            num_experts=8,
            experts_per_token=2,
            max_length=1024,
            residual_mlp=True,
        ),
        data=DataConfig(
            domains=(Domain("prose", "prose", 0.5), Domain("code", "code", 0.45), Domain("sql", "sql", 0.05)),
            sequence_length=256,
        ),
        train=TrainConfig(steps=600, batch_size=4, optimizer="muon", learning_rate=0.02, adam_learning_rate=0.006, warmup_steps=20),
        sample=SampleConfig(prompt="def read_"),
    )
