"""How many parameters a configuration has, by kind of module, in all and per token; from shapes alone, nothing is allocated."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from moejax.config import ModelConfig
from moejax.families.layout import EXPERT_LEAVES, ROUTER_BIAS, Shape, block_leaves, outer_leaves

BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KindCount:
    """Parameters of one kind of module, all layers together."""

    total: int
    active: int  # parameters one token meets: of the experts, only the experts_per_token it is sent to
    bytes: int  # of `total`, stored as config.param_dtype (the biases of routers as float32)


@dataclass(frozen=True)
class Counts:
    """Parameters of a whole model; `by_kind` adds up to the rest."""

    total: int
    active: int
    bytes: int
    by_kind: dict[str, KindCount]


def count_parameters(config: ModelConfig) -> Counts:
    """Counts the parameters of `config`: total, active per token, bytes as config.param_dtype, and the same by kind of module.

    Kinds, in this order where present: embedding, attention, router, experts, residual_mlp, dense_mlp, norms, head.
    """
    totals: dict[str, int] = defaultdict(int)
    active: dict[str, int] = defaultdict(int)
    stored: dict[str, int] = defaultdict(int)

    def add(leaf: str, shape: Shape) -> None:
        size = 1
        for length in shape:
            size *= length
        kind = _kind_of(leaf)
        totals[kind] += size
        stored[kind] += size * BYTES_PER_PARAMETER["float32" if leaf == ROUTER_BIAS else config.param_dtype]
        active[kind] += size // config.num_experts * config.experts_per_token if leaf in EXPERT_LEAVES else size

    for leaf, shape in outer_leaves(config).items():
        add(leaf, shape)
    for layer in range(config.num_layers):
        for leaf, shape in block_leaves(config, layer).items():
            add(leaf, shape)

    order = ("embedding", "attention", "router", "experts", "residual_mlp", "dense_mlp", "norms", "head")
    by_kind = {kind: KindCount(totals[kind], active[kind], stored[kind]) for kind in order if kind in totals}
    return Counts(sum(totals.values()), sum(active.values()), sum(stored.values()), by_kind)


def expect_touched(config: ModelConfig, rows: int) -> float:
    """Experts that `rows` tokens meet together under uniform routing: E (1 - (1 - A/E)^rows)."""
    return config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** rows)


def _kind_of(leaf: str) -> str:
    """The kind of module a leaf such as "moe/gate/kernel" belongs to."""
    module = leaf.split("/")[0]
    if module.endswith("norm"):
        return "norms"
    if module == "moe":
        return "experts" if leaf in EXPERT_LEAVES else "router"
    return {"embed": "embedding", "attention": "attention", "residual": "residual_mlp", "mlp": "dense_mlp", "head": "head"}[module]


def summarise(config: ModelConfig) -> str:
    """A table of the parameters by kind of module: number, share, those one token meets, and bytes as stored."""
    counts = count_parameters(config)
    lines = [
        f"{config.family}: {config.num_layers} layers, hidden size {config.hidden_size}, {config.num_experts} experts of width "
        f"{config.intermediate_size}, {config.experts_per_token} a token, stored as {config.param_dtype}",
        "",
        f"{'kind':<14}{'parameters':>18}{'share':>8}{'per token':>18}{'bytes':>20}",
    ]
    for kind, count in counts.by_kind.items():
        lines.append(f"{kind:<14}{count.total:>18,}{count.total / counts.total:>8.1%}{count.active:>18,}{count.bytes:>20,}")
    lines.append(f"{'total':<14}{counts.total:>18,}{1:>8.1%}{counts.active:>18,}{counts.bytes:>20,}")
    return "\n".join(lines)
