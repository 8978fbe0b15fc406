"""What a user should know before prompts are kept: a date in the chat template, prompts that are short."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from tierkv.engine.prompts import Tokenizer, chat_template_of
from tierkv.tools.terminal import note

__all__ = ["warn_of_date", "warn_of_short"]

_MOST_NAMED = 5


def warn_of_date(tokenizer: Tokenizer, day: date | None) -> None:
    """Note which date the chat template is given, if it writes one. day: None is the real one."""
    if "strftime_now" not in chat_template_of(tokenizer):
        return
    if day is None:
        text = "today's date: prompts that are cached today are not found tomorrow (--date YYYY-MM-DD keeps one)"
    else:
        text = f"{day.isoformat()} as today's date (--date today: the real one, and each day computes anew)"
    note(f"the chat template writes {text}")


def warn_of_short(lengths: Sequence[int], block_size: int) -> None:
    """Note which prompts have too few tokens to be kept, or too few for a whole block. lengths: tokens of each."""
    empty = [number for number, length in enumerate(lengths, start=1) if not length]
    short = [number for number, length in enumerate(lengths, start=1) if 0 < length < block_size]
    if empty:
        note(f"{_named(empty, lengths)}: requests have no token of it in common, and nothing is kept")
    if short:
        note(
            f"{_named(short, lengths)}: shorter than a block of {block_size} tokens. Only a partial block is kept, and "
            "engines that share whole blocks do not use it (--block-size sets a smaller one)"
        )


def _named(numbers: Sequence[int], lengths: Sequence[int]) -> str:
    listed = ", ".join(f"{number} ({lengths[number - 1]:,} tokens)" for number in numbers[:_MOST_NAMED])
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return f"{'prompt' if len(numbers) == 1 else 'prompts'} {listed}{more}"
