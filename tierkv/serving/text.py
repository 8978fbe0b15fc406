"""Text from tokens, one at a time: no half characters, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

__all__ = ["Detokenizer", "StopFinder", "TextDecoder"]

_UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_MAX_HELD = 3  # bytes of a character that are not its last
_KEPT = 8  # tokens before the new ones that are decoded again: what a token looks like depends on the one before
_MOST = 32


class TextDecoder(Protocol):
    """The method of a Hugging Face tokenizer that this module calls."""

    def decode(self, token_ids: Sequence[int], **options: object) -> str: ...


class Detokenizer:
    """The text of one answer, as its tokens come. Each token costs the decoding of at most 32 tokens.

    skipped: ids that have no text, such as special tokens. All texts together are the text of all tokens decoded at
    once. Of invalid bytes, decoders that fall back to bytes may count more or fewer.
    """

    def __init__(self, decoder: TextDecoder, *, skipped: Collection[int] = ()) -> None:
        self._decoder = decoder
        self._skipped = skipped
        self._ids: list[int] = []  # the last ones
        self._num_out = 0  # leading characters of their text that are out
        self._num_unknown = 0  # tokens since the text last ended with a whole character

    def push(self, token_id: int) -> str:
        """Return the text that is certain with one more token."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._text(self._ids)
        self._num_unknown = self._num_unknown + 1 if text.endswith(_UNKNOWN) else 0
        if 0 < self._num_unknown <= _MAX_HELD:
            return ""  # decoders that fall back to bytes write even the characters before it as unknown
        return self._take(text, len(text) - _num_held(text))

    def finish(self) -> str:
        """Return the rest: what was held back, because more tokens might have completed a character."""
        text = self._text(self._ids)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        new = text[self._num_out : end]
        self._num_out = max(self._num_out, end)
        if len(self._ids) >= _MOST:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Keep the last tokens only, from the beginning of a character on."""
        held = len(text) - self._num_out
        for count in range(_KEPT, _KEPT + _MAX_HELD + 1):
            kept = self._text(self._ids[-count:])
            if text.endswith(kept):
                break
        self._ids = self._ids[-count:]
        self._num_out = max(len(kept) - held, 0)

    def _text(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class StopFinder:
    """Holds back the end of a text while it may be the beginning of a stop string. Costs a step for each character."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # of each stop string, the characters that the text ends with
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that is before every stop string. After `found` is set, nothing more comes."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        for at, character in enumerate(text):
            if stop := self._step(character):
                self.found = stop
                whole = self._held + text[: at + 1]
                self._held = ""
                return whole[: len(whole) - len(stop)]
        whole = self._held + text
        keep = max(self._matched)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def finish(self) -> str:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Follow one character in every stop string. Return the longest that is complete now."""
        complete = []
        for number, (stop, failures) in enumerate(self._stops):
            count = self._matched[number]
            while count and stop[count] != character:
                count = failures[count - 1]
            count += stop[count] == character
            if count == len(stop):
                complete.append(stop)
                count = failures[count - 1]
            self._matched[number] = count
        return max(complete, key=len, default=None)


def _num_held(text: str) -> int:
    """Return how many characters at the end of a text may still become another one."""
    count = 0
    while count < min(_MAX_HELD, len(text)) and text[-1 - count] == _UNKNOWN:
        count += 1
    return count


def _failures(stop: str) -> list[int]:
    """For each prefix of a stop string, the length of its longest proper suffix that is a prefix too.

    Source: the failure function of Knuth, Morris and Pratt (1977).
    """
    failures = [0] * len(stop)
    count = 0
    for at in range(1, len(stop)):
        while count and stop[at] != stop[count]:
            count = failures[count - 1]
        count += stop[at] == stop[count]
        failures[at] = count
    return failures
