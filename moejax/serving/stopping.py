"""The text of one row as it comes, ended by the first stop string; what may be the beginning of one is held back."""

from collections.abc import Sequence

from moejax.data.text import StreamDecoder, Tokenizer


class StoppingDecoder:
    """Ids to text, one at a time, up to the first of `stops`, which is not part of the text.

    Stop strings are looked for in the text, so that they are found however its tokens are cut. All that `push` and `finish` return,
    joined, is the text before the leftmost stop string that is complete with some token.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), is_start: bool = False):
        self._decoder = StreamDecoder(tokenizer, is_start)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False  # a stop string was found; what follows is not looked at

    def push(self, id: int) -> str:
        """The text that is certain to stay with this id; often "" while it may be the beginning of a stop string."""
        return "" if self.stopped else self._take(self._decoder.push(id))

    def finish(self) -> str:
        """What is left where the row ends without a stop string."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.finish())
        return text if self.stopped else text + self._held

    def _take(self, new: str) -> str:
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        longest = max(map(len, self._stops), default=1) - 1
        held = next((size for size in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-size:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
