"""The mixture-of-experts layer: router, experts' weights, and `model.expert_dispatch` between them."""

import flax.linen as nn
import flax.struct
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.model.expert_dispatch import DOWN_AXES, GATE_AXES, TokenInputs, reach_experts
from moejax.model.layers import ExpertKernel, Router
from moejax.ops.capacity import first_choice_loss
from moejax.ops.expert_mlp import ExpertWeights
from moejax.ops.routing import RouterStatistics, router_statistics


@flax.struct.dataclass
class RouterOutputs:
    """What a router decided, per token (logits and weights float32), and its averages; layers stacked in front."""

    logits: Float[Array, "*layers B T E"]
    weights: Float[Array, "*layers B T A"]
    experts: Int[Array, "*layers B T A"]
    statistics: RouterStatistics
    first_choice_loss: Float[Array | np.ndarray, "*layers"]  # the load-balance loss of dispatch capacity; 0 for the others
    dropped: Int[Array | np.ndarray, "*layers"]  # choices that found no room


class MoE(nn.Module):
    """Routes every token to its experts and sums their weighted outputs."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], inputs: TokenInputs) -> tuple[Float[Array, "B T D"], RouterOutputs]:
        config, mesh = self.config, self.mesh
        size, width, experts = config.hidden_size, config.intermediate_size, config.num_experts
        logits, bias = Router(config, name="router")(x.astype(jnp.float32))
        weights = ExpertWeights(
            gate=ExpertKernel(config, (experts, width, size), GATE_AXES, name="gate")(),
            up=ExpertKernel(config, (experts, width, size), GATE_AXES, name="up")(),
            down=ExpertKernel(config, (experts, size, width), DOWN_AXES, name="down")(),
        )
        out, routing, dropped = reach_experts(config, mesh, x, logits, bias, weights, inputs)
        flat_logits, flat_experts = logits.reshape(-1, experts), routing.experts.reshape(-1, config.experts_per_token)
        counts = None if inputs.counts is None else inputs.counts.reshape(-1)
        statistics = router_statistics(flat_logits, flat_experts, counts)
        slot_loss = first_choice_loss(flat_logits, flat_experts, counts) if config.dispatch == "capacity" else jnp.zeros((), jnp.float32)
        return out, RouterOutputs(logits, routing.weights, routing.experts, statistics, slot_loss, dropped)
