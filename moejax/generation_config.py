"""How prompts are continued: one request's settings, validated when they are built. Standard library only."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from moejax.checks import UserError, nearest

_LARGEST_TOP = 1000  # log-probabilities reported beside the chosen token's


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt. temperature 0 is greedy; the other defaults switch off what they are for.

    Raises UserError, naming the field, for values that make no sense. The order in which the sampling fields act, and what each does
    exactly: `moejax.ops.sampling`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0  # modulo 2^32
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> what is added to its logit
    stop: tuple[str, ...] = ()  # texts at the first of which the text ends; a list or one text is taken, too
    stop_token_ids: tuple[int, ...] = ()  # ids that end a row beside the checkpoint's EOS ids, also with ignore_eos
    logprobs: int | None = None  # log-probabilities of the chosen tokens and of this many most likely ones; None: none
    prompt_logprobs: int | None = None  # the same of the prompt's tokens

    def __post_init__(self) -> None:
        self._make_plain()
        for name in ("max_new_tokens", "top_k"):
            self._require(name, _is_whole(getattr(self, name), 0), "a whole number from 0 on")
        self._require("seed", _is_whole(self.seed), "a whole number")
        self._require("temperature", _is_number(self.temperature) and self.temperature >= 0, "a number from 0 (greedy) on")
        self._require("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1 (1 switches it off)")
        self._require("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number between 0 (off) and 1")
        self._require("repetition_penalty", _is_number(self.repetition_penalty) and self.repetition_penalty > 0, "above 0 (1 is off)")
        for name in ("frequency_penalty", "presence_penalty"):
            self._require(name, _is_number(getattr(self, name)), "a number (0 is off)")
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        fits = all(_is_whole(id, 0) and _is_number(value) for id, value in pairs)
        self._require("logit_bias", fits, "a dict from token ids to numbers")
        self._require("stop", all(isinstance(text, str) and text for text in self.stop), "texts of at least one character")
        self._require("stop_token_ids", all(_is_whole(id, 0) for id in self.stop_token_ids), "token ids")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            fits = value is None or (_is_whole(value) and value in range(_LARGEST_TOP + 1))
            self._require(name, fits, f"None, or a whole number between 0 and {_LARGEST_TOP}")

    def _make_plain(self) -> None:
        """One text or a list becomes a tuple, None in a sequence's or mapping's place nothing; keys of JSON become ids."""
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) or _is_whole(value) else value
            self._require(name, isinstance(value, (tuple, list)), "a list")
            object.__setattr__(self, name, tuple(value))
        bias = self.logit_bias
        if bias is None:
            bias = {}
        elif isinstance(bias, Mapping):
            bias = {int(id) if isinstance(id, str) and id.isdecimal() else id: value for id, value in bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise UserError(f"{name}={getattr(self, name)!r}; expected {expected}")

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before matters to what is sampled next."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


def settings_per_row(options: Mapping[str, Any], rows: int) -> list[GenerationSettings]:
    """GenerationSettings of each row from options by name: one value for all rows, or a list with one per row.

    Stop strings and stop ids for all may be a list themselves; theirs are per row where an item is a list or None. Of one seed, row i
    gets seed + i. Raises UserError that names the field, and the row where it is one row's.
    """
    known = {item.name for item in fields(GenerationSettings)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"{unknown[0]} is no option of generation{nearest(unknown[0], known)}")
    options = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}
    lists = {name: value for name, value in options.items() if _is_per_row(name, value)}
    for name, values in lists.items():
        if len(values) != rows:
            raise UserError(f"{name} is a list of {len(values)} values, but there are {rows} prompts; give one value, or one per prompt")
    shared = GenerationSettings(**{name: value for name, value in options.items() if name not in lists})
    several = []
    for row in range(rows):
        own = {name: values[row] for name, values in lists.items()}
        try:
            several.append(replace(shared, **{"seed": shared.seed + row, **own}))
        except UserError as error:
            raise UserError(f"prompt {row}: {error}") from None
    return several


def _is_per_row(name: str, value: Any) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    return name not in ("stop", "stop_token_ids") or any(item is None or isinstance(item, (list, tuple)) for item in value)


def _is_whole(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
