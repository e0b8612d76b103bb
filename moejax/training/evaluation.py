"""Evaluation on held-out text, domain by domain."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.model.transformer import Transformer
from moejax.training.objectives import negative_log_likelihoods
from moejax.training.placement import fetch


def evaluate(model: Transformer, params: Any, batches: Iterable[Any]) -> tuple[float, int]:
    """Sum of -log p over all counted targets in nats, and their number. Several processes all give the same batches, whole."""
    total, count = 0.0, 0
    for batch in batches:
        total += float(np.sum(fetch(negative_log_likelihoods(model, {"params": params}, batch)), dtype=np.float64))
        count += int(np.sum(np.asarray(batch.weights)))
    return total, count


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out text of one domain: batches that cover every byte once, and the number of UTF-8 bytes they cover."""

    batches: list[Any]
    utf8_bytes: int
