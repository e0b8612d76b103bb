"""A small Arctic-style hybrid on text that every machine has: the default of train.py.

    python train.py

3,020,416 parameters, 1,840,768 of them met by a token: 4 layers of 8 experts, top-2, beside a dense residual. 600 steps of 4 x 256
tokens in three stages, from mostly prose towards code and generated SQL (`--data-plan` shows them), evaluated by domain every 50 steps.
Expect about 3 minutes on two quiet cores and, at the end, on up to 50 kB of held-out text a domain, about 1.88 bits per byte of prose, 1.70
of code and 0.61 of SQL, where gzip -9 needs 2.36, 1.88 and 1.44. curriculum.png shows the way there.
"""

from moejax.config import DataConfig, Domain, ModelConfig, RunConfig, SampleConfig, Stage, TrainConfig


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
            scan_layers=False,  # four layers compile quickly one by one, and a step is a tenth faster
        ),
        data=DataConfig(
            domains=(
                Domain("prose", "builtin:prose", max_megabytes=8.0),
                Domain("code", "builtin:code", max_megabytes=8.0),
                Domain("sql", "builtin:sql", max_megabytes=0.8),
            ),
            stages=(
                Stage(204_800, {"prose": 0.8, "code": 0.18, "sql": 0.02}),
                Stage(245_760, {"prose": 0.45, "code": 0.5, "sql": 0.05}),
                Stage(163_840, {"prose": 0.25, "code": 0.63, "sql": 0.12}),
            ),
            sequence_length=256,
        ),
        train=TrainConfig(
            batch_size=4,
            optimizer="muon",
            learning_rate=0.02,
            adam_learning_rate=0.006,
            warmup_steps=20,
            log_every=20,
            eval_every=50,
            eval_kilobytes=50.0,
        ),
        sample=SampleConfig(prompt="def read_"),
    )
