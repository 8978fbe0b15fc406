"""What the cold store needs of processes that decode its records in place of its own threads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.record import BlockInfo, Buffer
from tierkv.storage.record_source import FileRecord
from tierkv.values.layout import BlockLayout

__all__ = ["RecordDecoders", "RecordToDecode"]


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
