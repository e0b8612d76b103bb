"""Reads PEFT's adapter_config.json: the factor of each module, and a refusal by name of everything that is more than plain LoRA."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.checkpoint.torch_files import read_json
from moejax.config import UserError

PEFT_CONFIG = "adapter_config.json"
# What changes the computation beyond W + scale * B A; absent, null, false and empty mean that it is off.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that were trained whole",
    "fan_in_fan_out": "weights stored transposed",
    "lora_bias": "biases in lora_B",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA, which is on for some tokens only",
    "arrow_config": "Arrow routing of adapters",
    "trainable_token_indices": "retrained token embeddings",
}


@dataclass(frozen=True)
class PeftScaling:
    """The factor of each module's B A: `fixed` where it is not None, else alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

    fixed: float | None = None
    rank: int = 0
    alpha: float = 0.0
    rank_stabilised: bool = False
    ranks: dict[str, int] = field(default_factory=dict)  # pattern of module names -> rank
    alphas: dict[str, float] = field(default_factory=dict)

    def of(self, file: Path, module: str, rank: int) -> float:
        """The factor of `module`, whose lora_A has `rank` rows (per expert). Raises UserError where the configuration says otherwise."""
        if self.fixed is not None and self.rank == 0:
            return self.fixed
        expected = _match(self.ranks, module, self.rank)
        if rank != expected:
            raise UserError(f"{file}: {module} has rank {rank}, {PEFT_CONFIG} says {expected}; they are of different adapters")
        if self.fixed is not None:
            return self.fixed
        return _match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def _match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT finds it."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def read_peft_scaling(path: Path, scale: float | None) -> PeftScaling:
    """The factors that an adapter_config.json gives, or `scale` for all. Raises UserError for what is no plain LoRA, by name."""
    values = read_json(path, f"{path} is missing")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; only 'LORA' is merged")
    for name, what in _REFUSED.items():
        if values.get(name):
            raise UserError(f"{path}: {name} is {values[name]!r}: {what} cannot be merged here; merge it with PEFT and convert the result")
    if values.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {values['bias']!r}; the model's projections have none, so it must be 'none'")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path}: r is {rank!r}; expected the rank, a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: lora_alpha is {alpha!r}; expected a number")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    fixed = None if scale is None else float(scale)
    return PeftScaling(fixed, rank, float(alpha), bool(values.get("use_rslora")), dict(ranks), dict(alphas))
