"""The decoder: Block (one layer, wired as the family says), Period (the layers one scan step runs), Transformer."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.config import ModelConfig
from moejax.model.attention import Attention, Reads, RowView
from moejax.model.cache import Cache, place_cache
from moejax.model.expert_dispatch import TokenInputs
from moejax.model.layers import MLP, Embed, Head, RMSNorm
from moejax.model.moe import MoE, RouterOutputs
from moejax.model.positions import model_frequencies
from moejax.model.rolling_cache import RollingCache, view_rolling
from moejax.ops.attention import rotary_angles
from moejax.ops.matmul import project
from moejax.ops.routing import RouterStatistics, load_balance_loss
from moejax.ops.visibility import Indices, describe_visibility
from moejax.sharding import axis_size, constrain


@flax.struct.dataclass
class LayerInputs:
    """What every layer reads beside its input; the same for all."""

    reads: Reads
    tokens: TokenInputs


@flax.struct.dataclass
class Outputs:
    """The result of a forward pass; a field that was not asked for is None."""

    logits: Float[Array, "B T V"] | None
    features: Float[Array, "B T D"]  # after the final norm: what the head reads
    hidden: Float[Array, "layers_and_2 B T D"] | None  # embedding, every layer's output, after the final norm
    routing: RouterOutputs | None  # MoE layers stacked in front
    router_statistics: RouterStatistics | None  # [MoE layers, ...]; None in a model without MoE layers
    aux_loss: Float[Array, ""]  # the family's load-balance loss, unscaled
    z_loss: Float[Array, ""]  # mean over MoE layers, unscaled
    dropped: Int[Array, ""]  # tokens dropped by the dispatch
    cache: Cache | None


class Block(nn.Module):
    """One decoder layer. `is_moe` False is the dense layer of an interleaved model."""

    config: ModelConfig
    is_moe: bool
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None,
        layer: Int[Array, ""] | int,
        inputs: LayerInputs,
        noise: Float[Array, "B T E"] | None = None,
    ):
        config = self.config
        x = constrain(x, self.mesh, "batch", "time", None)
        attended, cache = Attention(config, self.mesh, name="attention")(
            RMSNorm(config, name="attention_norm")(x), inputs.reads, cache, layer
        )
        after = x + attended
        if not self.is_moe:
            out = after + MLP(config, config.intermediate_size, name="mlp")(RMSNorm(config, name="mlp_norm")(after))
            return out, cache, None
        # Beside the dense residual, the experts read the layer's input: neither branch waits for the other, and while rows travel to
        # their experts and back, attention and residual can run.
        is_parallel = config.residual_mlp and config.residual_order == "parallel"
        if config.residual_mlp and not is_parallel:
            after = self.add_residual(after)
        tokens = dataclasses.replace(inputs.tokens, noise=noise)
        moe_out, router = MoE(config, self.mesh, name="moe")(RMSNorm(config, name="moe_norm")(x if is_parallel else after), tokens)
        return (self.add_residual(after) if is_parallel else after) + moe_out, cache, router

    def add_residual(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """x and what the dense residual makes of it."""
        return x + MLP(self.config, self.config.hidden_size, name="residual")(RMSNorm(self.config, name="residual_norm")(x))


class Period(nn.Module):
    """`moe_every` consecutive layers, the body of the scan: dense ones, then the one with experts."""

    config: ModelConfig
    keep_hidden: bool
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | None], first_layer: Int[Array, ""], noise: Float[Array, "B T E"] | None, inputs: LayerInputs
    ):
        x, cache = carry
        hidden, router = [], None
        for j in range(self.config.moe_every):
            is_moe = self.config.is_moe_layer(j)
            block = Block(self.config, is_moe, self.mesh, name=f"block_{j}")
            x, cache, router = block(x, cache, first_layer + j, inputs, noise if is_moe else None)
            hidden.append(x)
        return (x, cache), (jnp.stack(hidden) if self.keep_hidden else None, router)


def _rematerialised(module: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
    if config.remat == "none":
        return module
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    return nn.remat(module, prevent_cse=not config.scan_layers, policy=policy)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head of one model; `apply(variables, tokens, ...)` runs it.

    `variables` is {"params": tree} with layers stacked by period (or apart, with config.scan_layers False: see
    `unstack_layers`). All arguments beside `tokens` are optional:

    mask: [B, T], 1 where a token is real (padding on the right). positions: rotary positions, default 0..T-1 (continuing
    from the cache). segments: [B, T] ids of packed documents, 0 is padding; tokens see only their own segment.
    cache: one that `create_cache` made, whose continuation comes back as `.cache`. return_hidden, return_routing: fill those fields.
    return_logits: False leaves logits out, for losses that apply the head in chunks. router_noise: [MoE layers, B, T, E], for dispatch
    capacity: Gumbel noise for all choices but the first, or, with one expert a token, which tokens come first where slots are short.

    With a mesh, variables and tokens may lie anywhere on it; batches and lengths that it does not divide are filled up inside.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    if TYPE_CHECKING:  # Linen declares apply for modules that also return mutated collections

        def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Outputs: ...

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        mask: Any = None,
        positions: Any = None,
        segments: Any = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
        return_routing: bool = False,
        return_logits: bool = True,
        router_noise: Any = None,
    ) -> Outputs:
        config, shape = self.config, tokens.shape
        tokens = jnp.asarray(tokens)
        real = _real_tokens(mask, segments)
        tokens, real, positions, segments, router_noise, fill = self._fill_up(tokens, real, positions, segments, router_noise, cache)
        inputs = self._layer_inputs(tokens, real, positions, segments, cache, fill, length=shape[1])
        x, embedding = Embed(config, self.mesh, name="embed")(tokens)
        embedded = x
        x, cache, hidden, router = self._run_layers(x, cache, inputs, router_noise, return_hidden)
        features = RMSNorm(config, name="final_norm")(x)
        head = embedding if config.tie_embeddings else Head(config, name="head")()
        logits = project(features, head.astype(features.dtype)).astype(jnp.float32) if return_logits else None
        if cache is not None:
            added = jnp.full(tokens.shape[:1], tokens.shape[1]) if real is None else jnp.sum(real, axis=1)
            cache = place_cache(dataclasses.replace(cache, lengths=cache.lengths + added.astype(jnp.int32)), self.mesh)
        statistics = None if router is None else router.statistics
        zero = jnp.float32(0.0)
        outputs = Outputs(
            logits=logits,
            features=features,
            hidden=jnp.stack([embedded, *hidden, features]) if return_hidden else None,
            routing=router if return_routing else None,
            router_statistics=statistics,
            aux_loss=zero if router is None else self._aux_loss(router),
            z_loss=zero if statistics is None else jnp.mean(statistics.z_loss),
            dropped=jnp.int32(0) if router is None else jnp.sum(router.dropped),
            cache=cache,
        )
        return outputs if fill is None else self._cut(outputs, shape)

    def _fill_up(self, tokens: Array, real: Any, positions: Any, segments: Any, noise: Any, cache: Cache | None):
        """The inputs with rows and positions added until the mesh divides them, and a mask of those. A cache keeps its rows as they are."""
        rows = -tokens.shape[0] % axis_size(self.mesh, "data", "fsdp", "expert")
        times = -tokens.shape[1] % axis_size(self.mesh, "context")
        if cache is not None or not (rows or times):
            return tokens, real, positions, segments, noise, None
        padding = ((0, rows), (0, times))
        fill = jnp.pad(jnp.zeros(tokens.shape, bool), padding, constant_values=True)
        real, positions, segments = (None if part is None else jnp.pad(jnp.asarray(part), padding) for part in (real, positions, segments))
        noise = None if noise is None else jnp.pad(jnp.asarray(noise), ((0, 0), *padding, (0, 0)))
        return jnp.pad(tokens, padding), real, positions, segments, noise, fill

    def _cut(self, outputs: Outputs, shape: tuple[int, ...]) -> Outputs:
        """The outputs without what `_fill_up` added."""
        batch, time = shape

        def cut(array: Array | None, behind: int) -> Array | None:
            return None if array is None else array[(..., slice(batch), slice(time), *(slice(None),) * behind)]

        routing = outputs.routing
        if routing is not None:
            routing = dataclasses.replace(
                routing, logits=cut(routing.logits, 1), weights=cut(routing.weights, 1), experts=cut(routing.experts, 1)
            )
        return dataclasses.replace(
            outputs, logits=cut(outputs.logits, 1), features=cut(outputs.features, 1), hidden=cut(outputs.hidden, 1), routing=routing
        )

    def _aux_loss(self, router: RouterOutputs) -> Float[Array, ""]:
        """The family's load-balance loss; DeepSpeed's, which Arctic trained with, where its slots are used."""
        if self.config.dispatch == "capacity" and self.config.router_aux_loss_kind == "per_layer":
            return jnp.sum(router.first_choice_loss)
        return load_balance_loss(router.statistics, self.config.router_aux_loss_kind)

    def _layer_inputs(
        self, tokens: Array, real: Array | None, positions: Any, segments: Any, cache: Cache | None, fill: Array | None, length: int
    ) -> LayerInputs:
        config, (batch, time) = self.config, tokens.shape
        if cache is not None and segments is not None:
            raise ValueError("segments and cache were both given; packed rows are for training, a cache holds one document a row")
        # Arctic's load-balance loss counts padding too; Mixtral's goes by the mask.
        counts = real if config.router_aux_loss_kind == "pooled" or segments is not None else None
        if fill is not None:
            counts = ~fill if counts is None else counts & ~fill
        token_inputs = TokenInputs(counts, fill)
        if isinstance(cache, RollingCache):
            if positions is not None:
                raise ValueError("positions were given with a cache that forgets; positions are those in the cache there, leave them out")
            return LayerInputs(view_rolling(cache, config, time, real), token_inputs)
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
        query_index = start[:, None] + jnp.arange(time, dtype=jnp.int32)[None, :]
        places = time if cache is None else cache.capacity
        key_index = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32)[None, :], (batch, places))
        segments = None if segments is None else jnp.asarray(segments)
        real_keys = real if cache is None else None  # in a cache, padding lies past the row's length and is never seen
        visibility = describe_visibility(
            Indices(query_index, segments),
            Indices(key_index, segments, real_keys),
            window=config.attention_window,
            num_keys=None if fill is None else length,
            whole_rows=cache is None,
        )
        positions = query_index if positions is None else jnp.asarray(positions)
        frequencies = model_frequencies(config, length if cache is None else cache.capacity)
        return LayerInputs(RowView(rotary_angles(positions, frequencies), visibility), token_inputs)

    def _run_layers(self, x: Array, cache: Cache | None, inputs: LayerInputs, noise: Array | None, keep_hidden: bool):
        """All layers; returns (x, cache, each layer's output if asked for, router outputs stacked over MoE layers)."""
        config = self.config
        hidden: list[Array] = []
        routers: list[RouterOutputs] = []
        unrolled = range(config.num_layers)
        if config.scan_layers:
            periods = config.num_layers // config.moe_every
            if periods:
                scan = nn.scan(
                    _rematerialised(Period, config),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # a tuple is what scan takes
                    length=periods,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                first_layers = jnp.arange(periods, dtype=jnp.int32) * config.moe_every
                in_scan = None if noise is None else noise[:periods]
                body = scan(config, keep_hidden, self.mesh, name="layers")
                (x, cache), (outputs, router) = body((x, cache), first_layers, in_scan, inputs)
                hidden += list(outputs.reshape(-1, *x.shape)) if keep_hidden else []
                routers += [router] if router is not None else []
            unrolled = range(periods * config.moe_every, config.num_layers)
        for layer in unrolled:
            is_moe = config.is_moe_layer(layer)
            block = _rematerialised(Block, config)(config, is_moe, self.mesh, name=f"layer_{layer}")
            x, cache, router = block(
                x, cache, layer, inputs, noise[config.moe_layers.index(layer)] if noise is not None and is_moe else None
            )
            hidden.append(x)
            routers += [jax.tree.map(lambda leaf: leaf[None], router)] if router is not None else []
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routers) if routers else None
        return x, cache, hidden, stacked


def _real_tokens(mask: Any, segments: Any) -> Array | None:
    """Which tokens are real: by the mask, by the segments (0 is padding), or all (None)."""
    real = None if mask is None else jnp.asarray(mask) != 0
    if segments is not None:
        in_segment = jnp.asarray(segments) != 0
        real = in_segment if real is None else real & in_segment
    return real


def head_weight(params: dict[str, Any]) -> Any:
    """The head's weight [V, D] in a parameter tree, as it lies there: its own, or the embedding where they are tied."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"]


def init_parameters(model: Transformer, key: Array) -> dict[str, Any]:
    """Freshly initialised parameters, a nested dict of arrays. Works under jit and eval_shape."""
    return nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32), return_logits=False))["params"]


@functools.lru_cache(maxsize=64)
def abstract_parameters(config: ModelConfig) -> dict[str, Any]:
    """Shapes and types of the parameters, nothing allocated."""
    return jax.eval_shape(functools.partial(init_parameters, Transformer(config)), jax.random.key(0))


def unstack_layers(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The tree of the same model with scan_layers=False: every layer's weights apart, under layer_{l}."""
    stacked = params.get("layers", {})
    tree = {name: value for name, value in params.items() if name != "layers"}
    for j in range(config.moe_every):
        for period in range(config.num_layers // config.moe_every):
            tree[f"layer_{period * config.moe_every + j}"] = jax.tree.map(lambda leaf, p=period: leaf[p], stacked[f"block_{j}"])
    return tree


def stack_layers(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `unstack_layers`: the stacked tree, which is the one of every checkpoint."""
    periods, stacked = config.num_layers // config.moe_every, {}
    for j in range(config.moe_every if periods else 0):
        layers = [params[f"layer_{period * config.moe_every + j}"] for period in range(periods)]
        stacked[f"block_{j}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    in_periods = {f"layer_{layer}" for layer in range(periods * config.moe_every)}
    tree = {name: value for name, value in params.items() if name not in in_periods}
    return tree | ({"layers": stacked} if stacked else {})
