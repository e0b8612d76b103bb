"""What the measured things cost at least, counted by hand: FLOP and bytes of an MoE layer, of prefill and of a decoding step."""

from moejax.config import ModelConfig
from moejax.families.counts import BYTES_PER_PARAMETER, count_parameters
from moejax.families.flops import count_flops


def count_layer_flops(config: ModelConfig, rows: int, choices: int) -> int:
    """FLOP of one MoE layer, forward: three matmuls for each of the `choices` of experts, and the router. Backward: twice as many."""
    return 6 * choices * config.hidden_size * config.intermediate_size + 2 * rows * config.hidden_size * config.num_experts


def count_layer_bytes(config: ModelConfig, rows: int, experts_touched: float) -> float:
    """Bytes that one MoE layer must move, forward: the touched experts' weights and the router's read, rows read, rows written."""
    weights = 3 * experts_touched * config.hidden_size * config.intermediate_size + config.hidden_size * config.num_experts
    return weights * BYTES_PER_PARAMETER[config.param_dtype] + 2 * rows * config.hidden_size * BYTES_PER_PARAMETER[config.dtype]


def count_prefill_flops(config: ModelConfig, rows: int, length: int) -> int:
    """Model FLOP of reading [rows, length] tokens, the head applied to each row's last one only."""
    return count_flops(config, rows, length) // 3 - 2 * rows * (length - 1) * config.vocab_size * config.hidden_size


def count_decode_flops(config: ModelConfig, rows: int, seen: float) -> float:
    """Model FLOP of one more token in each of `rows` rows, each attending to `seen` tokens, itself included."""
    attention = config.num_layers * 4 * config.num_heads * config.head_width * (seen - 1)
    return rows * (count_flops(config, 1, 1) / 3 + attention)


def count_decode_bytes(config: ModelConfig, rows: int, seen: float, experts_touched: float) -> dict[str, float]:
    """Bytes that a decoding step must read, by what they are of; `experts_touched` is the mean over MoE layers.

    Weights of attention, routers, dense MLPs, touched experts and head once each, and the keys and values of the `seen` tokens of every
    row. Norms, the rows of the embedding and what is written are left out: thousandths.
    """
    kinds = count_parameters(config).by_kind
    expert = 3 * config.hidden_size * config.intermediate_size
    counts: dict[str, float] = {kind: kinds[kind].total for kind in ("attention", "router", "residual_mlp", "dense_mlp") if kind in kinds}
    counts["experts"] = len(config.moe_layers) * experts_touched * expert
    counts["head"] = config.vocab_size * config.hidden_size
    parts = {kind: count * BYTES_PER_PARAMETER[config.param_dtype] for kind, count in counts.items()}
    keys_and_values = 2 * config.num_layers * rows * seen * config.num_kv_heads * config.head_width
    return {**parts, "keys_and_values": keys_and_values * BYTES_PER_PARAMETER[config.dtype]}
