"""The shape that figures are compared at: a small Mixtral, and how a benchmark is held to it."""

from typing import Any, TypeVar

from moejax.config import ModelConfig, UserError

# 39.07 M parameters, dropless; 2,048 tokens are 0.183 TFLOP of training.
PEER_SHAPE = ModelConfig(
    family="mixtral", vocab_size=32000, hidden_size=256, intermediate_size=896, num_layers=4, num_heads=8, num_kv_heads=2,
    head_size=32, num_experts=8, experts_per_token=2, rope_theta=1e6, residual_mlp=False, top_1_weight="one",
    router_aux_loss_kind="pooled", router_aux_loss_coefficient=0.0, scan_layers=False,
)  # fmt: skip
PEER_BATCH = (8, 256)  # rows and their length, in training
PEER_PROMPT, PEER_NEW = 32, 64  # tokens, in greedy decoding

SHAPE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "num_experts",
    "experts_per_token", "dtype", "param_dtype", "dispatch", "remat",
)  # fmt: skip
LAYER_FIELDS = ("hidden_size", "intermediate_size", "num_experts", "experts_per_token", "dtype", "param_dtype")  # of one MoE layer

Arguments = TypeVar("Arguments")


def hold_to_peer_shape(arguments: Arguments, **sizes: Any) -> Arguments:
    """The arguments, whose defaults are the peer shape. With --peer-shape they must be: raises UserError where `sizes` or model differ."""
    if not getattr(arguments, "peer_shape", False):
        return arguments
    wanted = {"model": PEER_SHAPE, **sizes} if hasattr(arguments, "model") else sizes
    for name, value in wanted.items():
        if getattr(arguments, name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--peer-shape says what the {name.replace('_', ' ')} is, and {flag} says otherwise; leave one of them out")
    return arguments
