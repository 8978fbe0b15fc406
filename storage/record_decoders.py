"""What the cold store needs of processes that decode its records in place of its own threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from tierkv.errors import CorruptBlockError, FormatVersionError
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.record import BlockInfo, Buffer, decode_record
from tierkv.storage.record_source import FileRecord
from tierkv.values.layout import BlockLayout

__all__ = ["RecordDecoders", "RecordToDecode", "decode_records"]


@dataclass(frozen=True, slots=True, eq=False)
class RecordToDecode:
    """A record, None where it was not found, the place for its block, and the block that it must be.

    coded: a GPU is to decode it, where its codec is the GPU's; see `decode_record`.
    """

    record: FileRecord | Bytes | None
    out: Buffer
    expected: BlockInfo
    coded: CodedBlock | None


class RecordDecoders(Protocol):
    """Decodes records outside of this interpreter."""

    @property
    def in_process(self) -> AbstractContextManager[object]:
        """Entered by a thread of this process while it decodes a record itself: only a few may do so at once."""

    def decode(
        self, wanted: Sequence[RecordToDecode], *, layout: BlockLayout, lossy_codec: str
    ) -> list[bool | OSError | None]:
        """Decode records of one namespace, each into its place. Return the outcome of each.

        True, it is the expected block and lies in its place; False, it is damaged or another block; OSError, the file
        was not read; None, not attempted, or not ended: then no process writes into its place any more.
        Raises nothing for a process that fails.
        """


def decode_records(
    wanted: Sequence[RecordToDecode], decoders: RecordDecoders | None, *, layout: BlockLayout, lossy_codec: str
) -> Iterator[bool | OSError]:
    """Decode records of one namespace, in this thread where no other process does it. Yield the outcome of each.

    True, it is the expected block; False, it is not, damaged or missing; OSError, the file was not read.
    """
    outcomes: Sequence[bool | OSError | None] = [None] * len(wanted)
    if decoders is not None:
        outcomes = decoders.decode(wanted, layout=layout, lossy_codec=lossy_codec)
    in_process = nullcontext() if decoders is None else decoders.in_process
    for each, outcome in zip(wanted, outcomes, strict=True):
        if outcome is not None:
            yield outcome
            continue
        with in_process:
            found = _decode(each, layout, lossy_codec)
        yield found


def _decode(wanted: RecordToDecode, layout: BlockLayout, lossy_codec: str) -> bool | OSError:
    if wanted.record is None:
        return False
    try:
        reason = decode_record(
            wanted.record,
            wanted.out,
            expected=wanted.expected,
            layout=layout,
            lossy_codec=lossy_codec,
            coded=wanted.coded,
        )
    except (CorruptBlockError, FormatVersionError):
        return False
    except OSError as exc:
        return exc
    return reason is None
