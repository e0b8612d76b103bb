"""The configuration of a run: frozen dataclasses, validated when they are built.

Standard library only, so that `--help` and every configuration error come before jax is imported. Field names become
flags: `RunConfig.train.save_every` is `--train.save-every`. Every size is a count unless its comment gives a unit.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DispatchName = Literal["sorted", "dense"]
DTypeName = Literal["float32", "bfloat16", "float16"]
RematName = Literal["none", "full", "dots"]


class UserError(ValueError):
    """Bad input, in one message: what, where, got, expected, what to do. Commands print it and exit with status 2."""


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending: what an error message offers instead of a size that does not divide."""
    return [d for d in range(1, number + 1) if number % d == 0]


_type_hints = functools.cache(get_type_hints)
_TYPE_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}


def _require_types(section: str, config: Any) -> None:
    """Raises UserError for the first field whose value is not of its annotated type; a whole number is a number too."""
    for name, expected in _type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of_type(value, expected):
            where = f"{section}.{name}" if section else name
            raise UserError(
                f"{where}={value!r} is of type {type(value).__name__}; expected {_describe_type(expected)}; "
                f"correct it in the config file or set --{where.replace('_', '-')}"
            )


def _is_of_type(value: Any, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin is Literal:
        return isinstance(value, str)  # which one, `_require_choice` says
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of_type(item, get_args(expected)[0]) for item in value)
    if origin in (Union, types.UnionType):
        return any(_is_of_type(value, option) for option in get_args(expected))
    if isinstance(value, bool):  # Python's bool is an int; a count that is True is a mistake
        return expected is bool
    if expected is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, expected)


def _describe_type(expected: Any) -> str:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"a tuple, each item {_describe_type(arguments[0])}"
    if arguments:
        return " or ".join(map(_describe_type, arguments))
    return _TYPE_NAMES.get(expected, f"a {expected.__name__}")


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{section}.{name}={value!r} must be greater than 0; set --{section}.{name.replace('_', '-')}")


def _require_choice(section: str, config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{section}.{name}={value!r} is unknown; expected one of {', '.join(choices)}{hint}")


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
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    moe_every: int = 1  # layer l is an MoE layer iff (l + 1) % moe_every == 0, else a dense layer
    residual_mlp: bool = True  # Arctic: a dense MLP of width hidden_size beside the MoE, which reads the layer's input
    top_1_weight: Literal["one", "probability"] = "probability"  # weight of the expert when experts_per_token is 1
    attention_window: int | None = None  # keys a query sees, itself included; None: all before it
    router_aux_loss_kind: Literal["pooled", "per_layer"] = "per_layer"  # Mixtral's (masked, pooled), or Arctic's (all positions, summed)
    router_aux_loss_coefficient: float = 0.001
    router_z_loss_coefficient: float = 0.0

    dispatch: DispatchName = "sorted"  # how tokens reach their experts: sorted (dropless) or dense (the slow reference)

    dtype: DTypeName = "float32"  # of activations and matmuls; norms, router, softmax and losses are float32 always
    param_dtype: DTypeName = "float32"  # of the stored weights
    remat: RematName = "none"  # what the backward pass recomputes: nothing, everything, or all but matmul outputs
    scan_layers: bool = True  # one compiled body for all layers, weights stacked; False: layers unrolled, weights apart

    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        _require_types("model", self)
        _require_positive(
            "model", self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
            "num_experts", "experts_per_token", "max_length", "rope_theta", "norm_epsilon", "moe_every", "attention_window",
        )  # fmt: skip
        _require_choice("model", self, "dispatch", ("sorted", "dense"))
        _require_choice("model", self, "top_1_weight", ("one", "probability"))
        _require_choice("model", self, "router_aux_loss_kind", ("pooled", "per_layer"))
        _require_choice("model", self, "dtype", ("float32", "bfloat16", "float16"))
        _require_choice("model", self, "param_dtype", ("float32", "bfloat16", "float16"))
        _require_choice("model", self, "remat", ("none", "full", "dots"))
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
        if self.head_width % 2:
            raise UserError(f"model.head_size={self.head_width} is odd; rotary position embeddings pair its halves, use an even number")
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
    """Sizes of the named device mesh; -1 takes the devices that are left. One device for now."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    stage: int = 1

    def __post_init__(self) -> None:
        _require_types("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"mesh.{name}={size} must be a positive number of devices, or -1 for all that are left")
        if sum(size == -1 for size in sizes.values()) > 1:
            unknown = [name for name, size in sizes.items() if size == -1]
            raise UserError(f"mesh axes {' and '.join(unknown)} are both -1; only one axis can take the devices that are left")


@dataclass(frozen=True)
class Domain:
    """One kind of text: where it comes from and its share of the training tokens.

    `source` names an entry of `moejax.data.sources`; `files` reads `path` (a file or a directory).
    """

    name: str
    source: str
    weight: float = 1.0
    path: str | None = None

    def __post_init__(self) -> None:
        _require_types("data.domains", self)
        if not self.weight > 0:
            raise UserError(f"data domain {self.name!r} has weight {self.weight}; expected more than 0, or leave the domain out")


@dataclass(frozen=True)
class DataConfig:
    """What the model reads. `path` replaces the domains by one, `text`, made of that file or directory."""

    domains: tuple[Domain, ...] = (Domain("prose", "prose"), Domain("code", "code"), Domain("sql", "sql", 0.1))
    path: str | None = None
    tokenizer: str | None = None  # a SentencePiece file; None: one is trained on the run's own text
    sequence_length: int = 256  # tokens a row
    max_megabytes: float = 8.0  # text read per domain, in 10^6 UTF-8 bytes
    held_out_fraction: float = 0.03  # share of whole documents (modules, files) kept for evaluation
    seed: int = 0

    def __post_init__(self) -> None:
        _require_types("data", self)
        _require_positive("data", self, "sequence_length", "max_megabytes")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(f"data.held_out_fraction={self.held_out_fraction} must lie between 0 and 1 (both excluded)")
        if not self.domains and self.path is None:
            raise UserError("data.domains is empty and data.path is not set; name at least one text to train on")
        names = [domain.name for domain in self.domains]
        if len(set(names)) < len(names):
            raise UserError(f"data.domains has two domains of one name in {names}; names must differ, evaluation reports by them")

    @property
    def sources(self) -> tuple[Domain, ...]:
        """The domains in force: those of the config, or the one of `path`."""
        return self.domains if self.path is None else (Domain("text", "files", 1.0, self.path),)


@dataclass(frozen=True)
class TrainConfig:
    """Length, optimiser and bookkeeping of a training run."""

    steps: int = 400
    batch_size: int = 8  # rows a step
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4  # peak
    adam_learning_rate: float = 3e-3  # peak for what Muon leaves to AdamW (embeddings, head, norms, router)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 20
    final_learning_rate_fraction: float = 0.05
    weight_decay: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.95
    clip_norm: float = 1.0  # of the global gradient
    log_every: int = 10
    save_every: int = 100
    eval_every: int = 0  # 0: only at the end
    eval_kilobytes: float = 200.0  # held-out text evaluated per domain, in 10^3 UTF-8 bytes
    keep_checkpoints: int = 2  # newest ones kept
    seed: int = 0

    def __post_init__(self) -> None:
        _require_types("train", self)
        _require_positive(
            "train", self, "steps", "batch_size", "learning_rate", "adam_learning_rate", "clip_norm", "log_every", "save_every"
        )
        _require_positive("train", self, "eval_kilobytes", "keep_checkpoints")
        _require_choice("train", self, "optimizer", ("adamw", "muon"))
        _require_choice("train", self, "schedule", ("cosine", "constant"))
        if self.warmup_steps < 0 or self.eval_every < 0:
            raise UserError(f"train.warmup_steps={self.warmup_steps} and train.eval_every={self.eval_every} must not be negative")


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

    def __post_init__(self) -> None:
        _require_types("sample", self)
        if self.max_new_tokens < 0 or self.top_k < 0 or self.temperature < 0:
            raise UserError(
                f"sample.max_new_tokens={self.max_new_tokens}, sample.top_k={self.top_k} and sample.temperature={self.temperature} "
                "must not be negative"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"sample.top_p={self.top_p} must be above 0 and at most 1 (1 switches it off)")


@dataclass(frozen=True)
class RunConfig:
    """One run: what is trained, on what, on which devices, and how it is sampled at the end."""

    name: str = "run"
    run_dir: str | None = None  # None: runs/<name>
    init_from: str | None = None  # a checkpoint whose weights and tokenizer the run starts with; "": one must be named by --init-from
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        _require_types("", self)
        if self.data.sequence_length > self.model.max_length:
            raise UserError(
                f"data.sequence_length={self.data.sequence_length} is longer than model.max_length={self.model.max_length}; "
                "shorten the rows or raise --model.max-length"
            )

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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where} has an unknown field {name!r}{hint}; it may come from a newer version of moejax")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def model_from_json(values: dict[str, Any], where: str = "model config") -> ModelConfig:
    """The ModelConfig written by `to_json`. Raises UserError, naming `where`, for fields it does not know."""
    return _from_json(ModelConfig, values, where)


def run_from_json(values: dict[str, Any], where: str = "run config") -> RunConfig:
    """The RunConfig written by `to_json`. Raises UserError, naming `where`, for fields it does not know."""
    data = dict(values["data"])
    data["domains"] = tuple(_from_json(Domain, domain, where) for domain in data["domains"])
    return RunConfig(
        name=values["name"],
        run_dir=values["run_dir"],
        init_from=values.get("init_from"),  # younger than some runs
        model=model_from_json(values["model"], where),
        mesh=_from_json(MeshConfig, values["mesh"], where),
        data=_from_json(DataConfig, data, where),
        train=_from_json(TrainConfig, values["train"], where),
        sample=_from_json(SampleConfig, values["sample"], where),
    )
