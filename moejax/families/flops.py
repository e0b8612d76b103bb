"""How much arithmetic a training step is, counted by hand from the configuration."""

from moejax.config import ModelConfig
from moejax.families.counts import count_parameters


def count_flops(config: ModelConfig, rows: int, length: int) -> int:
    """Model FLOP of one training step on [rows, length] tokens: 6 per matmul weight that a token meets, and attention counted causally.

    A multiplication and an addition are 2 FLOP; the backward pass is twice the forward (Kaplan et al. 2020, appendix B). Of the
    attention only the half of the square that a causal query sees is counted, and the whole row of it: that documents packed into
    one row do not see each other is not taken off. Recomputing (remat) is not model FLOP and is left out.
    """
    kinds = count_parameters(config).by_kind
    weights = sum(count.active for kind, count in kinds.items() if kind not in ("embedding", "norms"))
    if config.tie_embeddings:
        weights += config.vocab_size * config.hidden_size
    seen = length * (length + 1) // 2
    attention = config.num_layers * 4 * config.num_heads * config.head_width * seen
    return rows * (6 * weights * length + 3 * attention)
