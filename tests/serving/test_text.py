"""Text that comes token by token is the text of all tokens, and ends before a stop string."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tierkv.serving.text import Detokenizer, StopFinder

tokenizers = pytest.importorskip("tokenizers")


class ByteTokens:
    """Each id is a byte, as in a byte-level tokenizer."""

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


class Pieces:
    """A decoder of the tokenizers library over a vocabulary."""

    def __init__(self, vocabulary: list[str], decoder: object) -> None:
        self.tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab={piece: at for at, piece in enumerate(vocabulary)}, merges=[])
        )
        self.tokenizer.decoder = decoder

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))


def sentence_pieces() -> Pieces:
    """Make tokens as Llama 2 has them: words that begin with a blank, and bytes for other characters."""
    decoders = tokenizers.decoders
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
    return Pieces(["▁the", "▁", "s", "▁cat", "é", "<0xE4>", "<0xBD>", "<0xA0>"], decoders.Sequence(steps))


def pushed(detokenizer: Detokenizer, ids: Sequence[int]) -> str:
    return "".join(detokenizer.push(each) for each in ids) + detokenizer.finish()


@given(st.lists(st.integers(0, 255), max_size=200))
def test_the_texts_of_all_bytes_together_are_the_text_of_all(ids: list[int]) -> None:
    assert pushed(Detokenizer(ByteTokens()), ids) == ByteTokens().decode(ids)


@given(st.text(max_size=120))
def test_no_half_character_is_ever_sent(text: str) -> None:
    detokenizer = Detokenizer(ByteTokens())
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4], [5, 6, 7]]), max_size=100))
def test_words_keep_their_blanks_and_bytes_become_characters(groups: list[list[int]]) -> None:
    ids = [each for group in groups for each in group]
    assert pushed(Detokenizer(sentence_pieces()), ids) == sentence_pieces().decode(ids)


def test_a_long_text_of_characters_in_bytes_stays_whole() -> None:
    """Tokens are forgotten between two characters only: bytes from the middle of one would spoil all that follow."""
    ids = [5, 6, 7] * 60
    detokenizer = Detokenizer(sentence_pieces())
    pieces = [detokenizer.push(each) for each in ids]
    assert "".join(pieces) == "你" * 60


def test_skipped_tokens_have_no_text() -> None:
    assert pushed(Detokenizer(ByteTokens(), skipped={66}), [65, 66, 67]) == "AC"


def test_an_endless_row_of_invalid_bytes_costs_no_more_per_token() -> None:
    class Counting(ByteTokens):
        most = 0

        def decode(self, token_ids: Sequence[int], **options: object) -> str:
            Counting.most = max(Counting.most, len(token_ids))
            return super().decode(token_ids, **options)

    assert pushed(Detokenizer(Counting()), [0xFF, 0xE4] * 2000) == "\ufffd" * 4000
    assert Counting.most <= 32


@settings(max_examples=500)
@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.lists(st.text("ab", max_size=4)))
@example(["aab"], ["aa", "ab"])
def test_what_comes_is_the_text_before_the_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    finder = StopFinder(stops)
    out = ""
    for piece in pieces:
        out += finder.push(piece)
    whole = "".join(pieces)
    ends = [(end, -len(stop)) for stop in stops for end in range(len(whole) + 1) if whole[:end].endswith(stop)]
    if not ends:
        assert finder.found is None
        assert out + finder.finish() == whole
    else:
        end, length = min(ends)
        assert finder.found is not None and len(finder.found) == -length
        assert out == whole[: end + length]
        assert finder.finish() == ""


def test_text_that_may_begin_a_stop_string_is_held_back_and_no_other() -> None:
    finder = StopFinder(["END!"])
    assert [finder.push(piece) for piece in ("an EN", "D", " and", " E")] == ["an ", "", "END and", " "]
    assert finder.finish() == "E"


def test_a_hostile_stop_string_costs_a_step_for_each_character() -> None:
    finder = StopFinder(["a" * 1000 + "b"] * 16)
    started = time.process_time()
    for _ in range(1000):
        finder.push("a" * 20)
    assert time.process_time() - started < 5, "quadratic would take minutes"
