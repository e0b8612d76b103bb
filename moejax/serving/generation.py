"""One prompt on its way: what it was continued with, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from moejax.generation_config import GenerationSettings
from moejax.serving.decoding import Details, Routed, Scores
from moejax.serving.stopping import StoppingDecoder


class TokenScore(NamedTuple):
    """A token's log-probability under the model itself (before bias, penalties and temperature), and the most likely tokens' there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Routing(NamedTuple):
    """Where the model sent each token that it read: the prompt's, then the new ones but the last, which no one has read yet."""

    experts: np.ndarray  # int32 [tokens, MoE layers, A]
    weights: np.ndarray  # float32, the same shape


@dataclass
class Generation:
    """What one prompt was continued with, so far or in the end."""

    tokens: list[int] = field(default_factory=list)  # without the EOS or stop id that ended them
    text: str = ""  # up to a stop string; "" without a tokenizer
    finish_reason: Literal["stop", "length"] | None = None  # None while it goes on
    logprobs: list[TokenScore] | None = None  # of tokens
    prompt_logprobs: list[TokenScore | None] | None = None  # of the prompt's tokens; the first has none
    routing: Routing | None = None  # there when the row has ended

    def take(self) -> str:
        """The text so far, which is forgotten here, as are tokens and log-probabilities: a text without end needs no memory then."""
        text, self.text = self.text, ""
        self.tokens.clear()
        if self.logprobs is not None:
            self.logprobs.clear()
        return text


class Row:
    """A Generation in the making. `place` is the row's in the batch."""

    def __init__(self, prompt: Sequence[int], settings: GenerationSettings, stop_ids: tuple[int, ...], decoder: StoppingDecoder | None):
        self.prompt = [int(token) for token in prompt]
        self.settings = settings
        self.stop_ids = stop_ids
        self.count = 0  # tokens so far
        self.generation = Generation(logprobs=None if settings.logprobs is None else [])
        self._decoder = decoder
        self._routed: list[Routed] = []
        if settings.max_new_tokens == 0:
            self._end("length")

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.generation.finish_reason is not None

    def add_prompt(self, details: Details, place: int) -> None:
        """Takes what was asked for of the prompt's tokens."""
        length = len(self.prompt)
        if details.routing is not None:
            self._routed.append(Routed(details.routing.experts[place, :length], details.routing.weights[place, :length]))
        if self.settings.prompt_logprobs is not None and details.scores is not None:
            scores, wanted = details.scores, self.settings.prompt_logprobs
            known = [score_token(token, scores, (place, at), wanted) for at, token in enumerate(self.prompt[1:])]
            self.generation.prompt_logprobs = [None, *known]
        if self.ended:
            self._finish_routing()

    def add(self, token: int, details: Details, place: int) -> None:
        """Takes the next token, and ends the row where it does."""
        made = self.generation
        if details.routing is not None:
            self._routed.append(Routed(details.routing.experts[place][None], details.routing.weights[place][None]))
        if token in self.stop_ids:
            return self._end("stop")
        made.tokens.append(token)
        self.count += 1
        if made.logprobs is not None and details.scores is not None:
            made.logprobs.append(score_token(token, details.scores, place, self.settings.logprobs or 0))
        if self._decoder is not None:
            made.text += self._decoder.push(token)
            if self._decoder.stopped:
                return self._end("stop")
        if self.count == self.settings.max_new_tokens:
            self._end("length")

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self.generation.finish_reason = reason
        if self._decoder is not None:
            self.generation.text += self._decoder.finish()
            if self._decoder.stopped:
                self.generation.finish_reason = "stop"
        self._finish_routing()

    def _finish_routing(self) -> None:
        if self._routed:
            self.generation.routing = Routing(*(np.concatenate([getattr(part, name) for part in self._routed]) for name in Routing._fields))


def score_token(token: int, scores: Scores, place: Any, wanted: int) -> TokenScore:
    """The TokenScore at one place of Scores."""
    top = zip(scores.top_ids[place][:wanted], scores.top[place][:wanted], strict=True)
    return TokenScore(token, float(scores.chosen[place]), tuple((int(id), float(value)) for id, value in top))
