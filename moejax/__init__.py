"""moejax: mixture-of-experts language models, Mixtral and Snowflake Arctic, in JAX and Flax.

model, variables, tokenizer = moejax.load(path)
out = model.apply(variables, tokens)
losses = moejax.loss(model, variables, tokens, labels)
texts = moejax.generate(model, variables, tokenizer, prompts)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that configuration errors and `--help` never wait for jax.
_HOMES = {
    "load": "moejax.api",
    "save": "moejax.api",
    "convert": "moejax.checkpoint.conversion",
    "generate": "moejax.api",
    "load_tokenizer": "moejax.api",
    "loss": "moejax.training.objectives",
    "make_mesh": "moejax.sharding",
    "Transformer": "moejax.model.transformer",
    "RunConfig": "moejax.config",
    "ModelConfig": "moejax.config",
    "UserError": "moejax.config",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from moejax.api import generate as generate
    from moejax.api import load as load
    from moejax.api import load_tokenizer as load_tokenizer
    from moejax.api import save as save
    from moejax.checkpoint.conversion import convert as convert
    from moejax.config import ModelConfig as ModelConfig
    from moejax.config import RunConfig as RunConfig
    from moejax.config import UserError as UserError
    from moejax.model.transformer import Transformer as Transformer
    from moejax.sharding import make_mesh as make_mesh
    from moejax.training.objectives import loss as loss


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
