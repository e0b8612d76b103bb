"""The configuration of a run: frozen dataclasses, validated when they are built.

Standard library only, so that `--help` and every configuration error come before jax is imported. Field names become
flags: `RunConfig.train.save_every` is `--train.save-every`. Every size is a count unless its comment gives a unit.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from moejax.checks import UserError, divisors, nearest, require_choice, require_positive, require_types
from moejax.data_config import DataConfig, Domain, Stage
from moejax.generation_config import GenerationSettings
from moejax.rope_config import RopeScaling

DispatchName = Literal["auto", "sorted", "dense", "ragged", "gather", "capacity"]
DTypeName = Literal["float32", "bfloat16", "float16"]
RematName = Literal["none", "full", "dots"]
OptimizerName = Literal["adamw", "adafactor", "lion", "muon"]
ScheduleName = Literal["cosine", "wsd", "linear", "constant"]

DEFAULT_STEPS = 400  # of a run that says neither how many steps it takes nor how many tokens its stages have


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and wiring of one mixture-of-experts decoder; everything the forward pass depends on.

    The wiring fields (`residual_mlp` down to `router_aux_loss_kind`) are what sets Mixtral and Arctic apart; a family's
    file in `moejax/families` fills them in. Raises UserError for sizes that cannot work together.
    """

    family: str = "arctic"
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 128  # width of one expert, and of the dense layers of an interleaved model
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int | None = None  # None: hidden_size / num_heads
    num_experts: int = 8
    experts_per_token: int = 2
    max_length: int = 4096  # positions the model is meant for, in tokens
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)  # longer texts than those trained on: docs/inference.md
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    moe_every: int = 1  # layer l is an MoE layer iff (l + 1) % moe_every == 0, else a dense layer
    residual_mlp: bool = True  # Arctic: a dense MLP of width hidden_size beside the MoE, which reads the layer's input
    residual_order: Literal["parallel", "sequential"] = "parallel"  # sequential: the experts behind the dense MLP, reading what it adds to
    top_1_weight: Literal["one", "probability"] = "probability"  # weight of the expert when experts_per_token is 1
    attention_window: int | None = None  # keys a query sees, itself included; None: all before it
    router_aux_loss_kind: Literal["pooled", "per_layer"] = "per_layer"  # Mixtral's (masked, pooled), or Arctic's (all positions, summed)
    router_aux_loss_coefficient: float = 0.001
    router_bias: bool = False  # a bias per expert, added to its probability when experts are chosen: balances load without a loss
    router_z_loss_coefficient: float = 0.0

    dispatch: DispatchName = "auto"  # how tokens reach their experts: docs/meshes.md. auto never drops one; capacity does
    capacity_factor: float = 1.0  # capacity: an expert's slots over what it would get from an even router
    min_capacity: int = 0  # capacity: slots an expert has at least, for the rows of one device
    drop_tokens: bool = True  # capacity: False gives every expert a slot for every row
    ragged_buffer_factor: float | None = None  # ragged: rows a device has room for over what an even router sends; None: for all there are

    dtype: DTypeName = "float32"  # of activations and matmuls; norms, router, softmax and losses are float32 always
    param_dtype: DTypeName = "float32"  # of the stored weights
    remat: RematName = "none"  # what the backward pass recomputes: nothing, everything, or all but matmul outputs
    scan_layers: bool = True  # one compiled body for all layers, weights stacked; False: layers unrolled, weights apart

    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        require_types("model", self)
        require_positive(
            "model", self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
            "num_experts", "experts_per_token", "max_length", "rope_theta", "norm_epsilon", "moe_every", "attention_window",
            "capacity_factor", "ragged_buffer_factor",
        )  # fmt: skip
        require_choice("model", self, "dispatch", get_args(DispatchName))
        require_choice("model", self, "residual_order", ("parallel", "sequential"))
        require_choice("model", self, "top_1_weight", ("one", "probability"))
        require_choice("model", self, "router_aux_loss_kind", ("pooled", "per_layer"))
        require_choice("model", self, "dtype", ("float32", "bfloat16", "float16"))
        require_choice("model", self, "param_dtype", ("float32", "bfloat16", "float16"))
        require_choice("model", self, "remat", ("none", "full", "dots"))
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}; use one of "
                f"{', '.join(map(str, divisors(self.hidden_size)))}, or set --model.head-size"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}; use one of "
                f"{', '.join(map(str, divisors(self.num_heads)))}"
            )
        if self.router_bias and self.dispatch == "capacity":
            raise UserError(
                "model.router_bias=True balances the experts of dropless dispatch, but model.dispatch='capacity' has gates of its own; "
                "set --no-model.router-bias, or --model.dispatch auto"
            )
        if self.head_width % 2:
            raise UserError(f"model.head_size={self.head_width} is odd; rotary position embeddings pair its halves, use an even number")
        if self.rope_scaling.kind == "dynamic" and self.head_width < 4:
            raise UserError(f"model.rope_scaling.kind='dynamic' needs heads at least 4 wide, got model.head_size={self.head_width}")
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} is more than model.num_experts={self.num_experts}; "
                f"use 1 to {self.num_experts}"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_size if self.head_size is not None else self.hidden_size // self.num_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) holds experts; the others hold one dense MLP of width intermediate_size."""
        return (layer + 1) % self.moe_every == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold experts."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe_layer(layer))


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the named device mesh; -1 takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    stage: int = 1

    def __post_init__(self) -> None:
        require_types("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"mesh.{name}={size} must be a positive number of devices, or -1 for all that are left")
        if sum(size == -1 for size in sizes.values()) > 1:
            unknown = [name for name, size in sizes.items() if size == -1]
            raise UserError(f"mesh axes {' and '.join(unknown)} are both -1; only one axis can take the devices that are left")


@dataclass(frozen=True)
class DistributedConfig:
    """Which of several processes this is, where the environment does not say so by itself (docs/meshes.md): all three or none."""

    coordinator: str | None = None  # HOST:PORT at which process 0 waits for the others
    process_id: int | None = None  # from 0
    num_processes: int | None = None
    timeout: int = 300  # seconds within which all of them must have met

    def __post_init__(self) -> None:
        require_types("distributed", self)
        require_positive("distributed", self, "num_processes", "timeout")
        given = {name: getattr(self, name) for name in ("coordinator", "process_id", "num_processes")}
        missing = [f"--distributed.{name.replace('_', '-')}" for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise UserError(f"one of several processes needs {' and '.join(missing)} too; set it, or none of the three")
        if self.coordinator is None or self.process_id is None or self.num_processes is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"distributed.coordinator={self.coordinator!r} is no address; expected HOST:PORT, as 10.0.0.2:8476")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(f"distributed.process_id={self.process_id} must lie between 0 and {self.num_processes - 1}")


@dataclass(frozen=True)
class TrainConfig:
    """Length, optimiser and bookkeeping of a training run."""

    steps: int | None = None  # None: to the end of the stages; a run longer than its stages goes on with the last one's mixture
    batch_size: int = 8  # rows a step
    accumulation_steps: int = 1  # parts that a batch is computed in, one after another: less memory, the same gradient
    optimizer: OptimizerName = "adamw"  # float32 bytes of state a parameter: adamw 8, lion 4, muon 4, adafactor under 0.01
    learning_rate: float = 3e-4  # peak
    adam_learning_rate: float = 3e-3  # peak for what Muon leaves to AdamW (embeddings, head, norms, router)
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # share of the steps, at the end, over which schedule wsd comes down
    final_learning_rate_fraction: float = 0.05
    weight_decay: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.95
    clip_norm: float = 1.0  # of the global gradient
    router_bias_rate: float = 1e-3  # a step's change of the biases that balance the experts' load, where model.router_bias is on
    max_nonfinite_steps: int = 10  # steps in a row with an infinite or undefined gradient after which the run stops; each is skipped
    log_every: int = 10
    save_every: int = 100
    eval_every: int = 0  # 0: only at the end
    eval_kilobytes: float = 200.0  # held-out text evaluated per domain, in 10^3 UTF-8 bytes
    keep_checkpoints: int = 2  # newest ones kept
    keep_every: int = 0  # steps; checkpoints at its multiples are kept for good. 0: none is
    tensorboard: bool = True  # event files in the run's directory
    wandb: str | None = None  # project of Weights & Biases that the metrics go to as well; needs the wandb package
    profile_steps: str | None = None  # FIRST:LAST, both included: a trace of these steps in the run's directory
    compiler_options: Literal["overlap", "default"] = "overlap"  # moejax/compiler_options.py; default: XLA's own
    seed: int = 0

    def __post_init__(self) -> None:
        require_types("train", self)
        require_positive(
            "train", self, "steps", "batch_size", "accumulation_steps", "learning_rate", "adam_learning_rate", "clip_norm", "log_every",
            "save_every", "eval_kilobytes", "keep_checkpoints", "max_nonfinite_steps",
        )  # fmt: skip
        require_choice("train", self, "optimizer", get_args(OptimizerName))
        require_choice("train", self, "schedule", get_args(ScheduleName))
        require_choice("train", self, "compiler_options", ("overlap", "default"))
        for name in ("warmup_steps", "eval_every", "keep_every", "router_bias_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name}={getattr(self, name)} must not be negative; set --train.{name.replace('_', '-')}")
        for name in ("decay_fraction", "final_learning_rate_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"train.{name}={getattr(self, name)} must lie between 0 and 1; set --train.{name.replace('_', '-')}")
        if self.batch_size % self.accumulation_steps:
            raise UserError(
                f"train.accumulation_steps={self.accumulation_steps} does not divide train.batch_size={self.batch_size}; use one of "
                f"{', '.join(map(str, divisors(self.batch_size)))}"
            )
        self.profiled  # noqa: B018 - raises for what is no range

    @property
    def profiled(self) -> range:
        """The steps to trace, as a range; empty for none. Steps count from 1."""
        if self.profile_steps is None:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"train.profile_steps={self.profile_steps!r} is no range of steps; expected FIRST:LAST, as 10:13")
        return range(int(match[1]), int(match[2]) + 1)


@dataclass(frozen=True)
class SampleConfig:
    """How text is sampled; temperature 0 is greedy."""

    prompt: str = "def read_"
    max_new_tokens: int = 96
    temperature: float = 0.8
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    ignore_eos: bool = False

    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    frequency_penalty: float = 0.0  # 0: off
    presence_penalty: float = 0.0  # 0: off
    stop: tuple[str, ...] = ()  # texts before the first of which the sample ends

    def __post_init__(self) -> None:
        require_types("sample", self)
        try:
            self.settings  # noqa: B018 - raises for what makes no sense
        except UserError as error:
            raise UserError(f"sample.{error}") from None

    @property
    def settings(self) -> GenerationSettings:
        """All but the prompt, as generation takes it."""
        values = dataclasses.asdict(self)
        return GenerationSettings(**{name: value for name, value in values.items() if name != "prompt"})


@dataclass(frozen=True)
class RunConfig:
    """One run: what is trained, on what, on which devices, and how it is sampled at the end."""

    name: str = "run"
    run_dir: str | None = None  # None: runs/<name>
    init_from: str | None = None  # a checkpoint whose weights and tokenizer the run starts with; "": one must be named by --init-from
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require_types("", self)
        if self.data.sequence_length > self.model.max_length:
            raise UserError(
                f"data.sequence_length={self.data.sequence_length} is longer than model.max_length={self.model.max_length}; "
                "shorten the rows or raise --model.max-length"
            )

    @property
    def tokens_per_step(self) -> int:
        """Positions a step reads, padding included."""
        return self.train.batch_size * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Steps of the whole run: train.steps, else as many as the stages' tokens fill."""
        if self.train.steps is not None:
            return self.train.steps
        tokens = [stage.tokens for stage in self.data.curriculum]
        if None in tokens:
            return DEFAULT_STEPS
        return -(-sum(count for count in tokens if count is not None) // self.tokens_per_step)

    @property
    def directory(self) -> str:
        """Where the run keeps everything it writes."""
        return self.run_dir if self.run_dir is not None else f"runs/{self.name}"


def to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _from_json(kind: type, values: dict[str, Any], where: str) -> Any:
    """Builds dataclass `kind` from JSON values; unknown names are an error, missing ones keep their default."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise UserError(f"{where} has an unknown field {name!r}{nearest(name, known)}; it may come from a newer version of moejax")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def model_from_json(values: dict[str, Any], where: str = "model config") -> ModelConfig:
    """The ModelConfig written by `to_json`. Raises UserError, naming `where`, for fields it does not know."""
    scaling = _from_json(RopeScaling, values.get("rope_scaling", {}), where)  # younger than some checkpoints
    return _from_json(ModelConfig, {**values, "rope_scaling": scaling}, where)


def run_from_json(values: dict[str, Any], where: str = "run config") -> RunConfig:
    """The RunConfig written by `to_json`. Raises UserError, naming `where`, for fields it does not know."""
    data = dict(values["data"])
    data["domains"] = tuple(_from_json(Domain, domain, where) for domain in data["domains"])
    data["stages"] = tuple(_from_json(Stage, stage, where) for stage in data.get("stages", ()))
    return RunConfig(
        name=values["name"],
        run_dir=values["run_dir"],
        init_from=values.get("init_from"),  # younger than some runs
        model=model_from_json(values["model"], where),
        mesh=_from_json(MeshConfig, values["mesh"], where),
        distributed=_from_json(DistributedConfig, values.get("distributed", {}), where),  # younger than some runs
        data=_from_json(DataConfig, data, where),
        train=_from_json(TrainConfig, values["train"], where),
        sample=_from_json(SampleConfig, values["sample"], where),
    )
