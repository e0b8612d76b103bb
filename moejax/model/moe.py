"""The mixture-of-experts layer: router, experts, dispatch."""

import flax.linen as nn
import flax.struct
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.config import ModelConfig
from moejax.model.layers import ExpertKernel, Router
from moejax.ops.dispatch import apply_experts
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.routing import RouterStatistics, route, router_statistics


@flax.struct.dataclass
class RouterOutputs:
    """What a router decided, per token (logits and weights float32), and its averages; layers stacked in front."""

    logits: Float[Array, "*layers B T E"]
    weights: Float[Array, "*layers B T A"]
    experts: Int[Array, "*layers B T A"]
    statistics: RouterStatistics


class MoE(nn.Module):
    """Routes every token to its experts and sums their weighted outputs. No capacity: no token is dropped.

    `counts` says which tokens enter the router's averages; all of them where it is None.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], counts: Bool[Array, "B T"] | None) -> tuple[Float[Array, "B T D"], RouterOutputs]:
        config = self.config
        size, width, experts = config.hidden_size, config.intermediate_size, config.num_experts
        rows = x.reshape(-1, size)
        logits, bias = Router(config, name="router")(rows.astype(jnp.float32))
        routing = route(logits, config.experts_per_token, config.top_1_weight, bias)
        weights = ExpertWeights(
            gate=ExpertKernel(config, (experts, width, size), ("expert", "mlp", "embed"), name="gate")(),
            up=ExpertKernel(config, (experts, width, size), ("expert", "mlp", "embed"), name="up")(),
            down=ExpertKernel(config, (experts, size, width), ("expert", "embed", "mlp"), name="down")(),
        )
        out = apply_experts(rows, routing, weights, config.dispatch).reshape(x.shape)

        def by_token(values: Array) -> Array:
            return values.reshape(*x.shape[:2], values.shape[-1])

        statistics = router_statistics(logits, routing.experts, None if counts is None else counts.reshape(-1))
        return out, RouterOutputs(by_token(logits), by_token(routing.weights), by_token(routing.experts), statistics)
