"""What a run reads: domains of text, and the stages that mix them. Frozen dataclasses, validated when they are built.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moejax.checks import UserError, nearest, require_choice, require_positive, require_types

TextFormat = Literal["auto", "text", "jsonl", "parquet", "array_record"]

BUILTIN_TEXTS = ("prose", "code", "sql", "passkey")  # what `builtin:NAME` may name


@dataclass(frozen=True)
class Domain:
    """One kind of text and where it lies; it is evaluated by itself, and mixed with the others by the weights of a `Stage`.

    `path` is a file, a directory or a pattern with `*`; `hf://datasets/OWNER/NAME[/PATTERN]`, files of a data set of the Hub; or
    `builtin:prose`, `builtin:code`, `builtin:sql`, `builtin:passkey`: docstrings and comments, and code, of the Python packages at hand,
    generated SQL, and numbers to be found in filler.
    """

    name: str
    path: str
    format: TextFormat = "auto"  # auto: by the ending of each file's name
    text_field: str = "text"  # of JSONL, Parquet and ArrayRecord: the field that holds a document
    max_megabytes: float | None = None  # text read, in 10^6 UTF-8 bytes; None: all of it

    def __post_init__(self) -> None:
        require_types("data.domains", self)
        require_positive("data.domains", self, "max_megabytes")
        require_choice("data.domains", self, "format", get_args(TextFormat))
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"data domain {self.name!r}: a name has letters, digits, '-', '_' and '.' only; it becomes part of file names")
        if self.builtin is not None and self.builtin not in BUILTIN_TEXTS:
            raise UserError(
                f"data domain {self.name!r} has the path {self.path!r}; expected builtin: and one of {', '.join(BUILTIN_TEXTS)}"
                f"{nearest(self.builtin, BUILTIN_TEXTS)}"
            )

    @property
    def builtin(self) -> str | None:
        """The name behind `builtin:`; None for text of files."""
        return self.path.removeprefix("builtin:") if self.path.startswith("builtin:") else None


@dataclass(frozen=True)
class Stage:
    """A part of the training with one mixture: how many tokens it takes, and each domain's weight among them, in tokens.

    Weights are relative: {"code": 3, "prose": 1} is three quarters code. The last stage may leave its tokens open (None): it lasts as
    long as the run.
    """

    tokens: int | None
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if isinstance(self.tokens, float) and self.tokens.is_integer():  # 1e12 is how one writes it
            object.__setattr__(self, "tokens", int(self.tokens))
        require_types("data.stages", self)
        require_positive("data.stages", self, "tokens")
        if not self.weights or not all(weight > 0 for weight in self.weights.values()):
            raise UserError(
                f"data.stages: weights {dict(self.weights)!r}; expected a weight above 0 for each domain of the stage, and one at least"
            )


@dataclass(frozen=True)
class DataConfig:
    """What the model reads, in which order. `path` replaces the domains by one, `text`, made of that file or directory."""

    domains: tuple[Domain, ...] = (
        Domain("prose", "builtin:prose", max_megabytes=8.0),
        Domain("code", "builtin:code", max_megabytes=8.0),
        Domain("sql", "builtin:sql", max_megabytes=0.8),
    )
    stages: tuple[Stage, ...] = ()  # one after another; (): one, with equal weights
    path: str | None = None
    tokenizer: str | None = None  # a tokenizer file or a directory with one; None: one is trained on the run's own text
    sequence_length: int = 256  # tokens a row
    max_megabytes: float | None = None  # text read per domain, in 10^6 UTF-8 bytes, where the domain itself allows more
    held_out_fraction: float = 0.03  # share of whole documents (modules, files, lines of JSONL) kept for evaluation
    skip_bad: bool = False  # leave out, and count, lines that are no JSON or have no text, instead of stopping
    cache_dir: str | None = None  # where tokens are kept; None: $MOEJAX_CACHE, else ~/.cache/moejax
    workers: int | None = None  # processes that tokenise, threads where there is little text; None: one a core
    seed: int = 0

    def __post_init__(self) -> None:
        require_types("data", self)
        require_positive("data", self, "sequence_length", "max_megabytes", "workers")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(f"data.held_out_fraction={self.held_out_fraction} must lie between 0 and 1 (both excluded)")
        if not self.domains and self.path is None:
            raise UserError("data.domains is empty and data.path is not set; name at least one text to train on")
        names = [domain.name for domain in self.domains]
        if len(set(names)) < len(names):
            raise UserError(f"data.domains has two domains of one name in {names}; names must differ, evaluation reports by them")
        for number, stage in enumerate(self.stages):
            for name in stage.weights:
                if name not in names:
                    raise UserError(
                        f"data.stages.{number} gives a weight to {name!r}, which is none of data.domains ({', '.join(names)})"
                        f"{nearest(name, names)}"
                    )
            if stage.tokens is None and number < len(self.stages) - 1:
                raise UserError(
                    f"data.stages.{number}.tokens is None, but a stage follows it; only the last one may last as long as the run"
                )

    @property
    def sources(self) -> tuple[Domain, ...]:
        """The domains in force: those of the config, or the one of `path`."""
        return self.domains if self.path is None else (Domain("text", self.path),)

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        """The stages in force; without any, one that lasts as long as the run and weighs all domains alike."""
        if self.stages and self.path is None:
            return self.stages
        return (Stage(None, {domain.name: 1.0 for domain in self.sources}),)
