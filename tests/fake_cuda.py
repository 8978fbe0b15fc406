"""Streams and events as CUDA has them, in plain Python: work is done when the program waits for it, not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

__all__ = ["FailingCopies", "FakeCuda", "FakeEvent", "FakeStream"]


class FakeStream:
    """Counts queued work, and is idle after a wait for it."""

    def __init__(self, device: object = None) -> None:
        self.num_queued = 0
        self.cuda_stream = 0

    def synchronize(self) -> None:
        self.num_queued = 0

    def wait_stream(self, other: FakeStream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: FakeEvent) -> None:
        """Nothing to wait for."""


class FakeEvent:
    """Done when its stream is idle. Knows the streams that were made to wait for it."""

    def __init__(self, **_: object) -> None:
        self.stream: FakeStream | None = None
        self.waiting: list[FakeStream] = []
        self.device = torch.device("cpu")

    def record(self, stream: FakeStream | None = None) -> None:
        self.stream = stream

    def wait(self, stream: FakeStream | None = None) -> None:
        if stream:
            self.waiting.append(stream)

    def query(self) -> bool:
        return self.stream is None or not self.stream.num_queued

    def synchronize(self) -> None:
        if self.stream:
            self.stream.synchronize()


class FakeCuda:
    """Puts the fakes in torch's place. `current` is the stream that calls run on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = FakeStream()
        patch.setattr(torch.cuda, "Stream", FakeStream)
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "stream", self.using)
        patch.setattr(torch.cuda, "current_stream", lambda *_: self.current)

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class FailingCopies:
    """Counts copies as work of the current stream; the one that is number `fail_at`, from 0, raises."""

    def __init__(self, patch: pytest.MonkeyPatch, cuda: FakeCuda, *, fail_at: int) -> None:
        self.count = 0
        copy_: Callable[..., Any] = torch.Tensor.copy_

        def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            self.count += 1
            if self.count > fail_at:
                raise RuntimeError("CUDA error: the copy engine has had enough")
            cuda.current.num_queued += 1
            result: torch.Tensor = copy_(target, source)
            return result

        patch.setattr(torch.Tensor, "copy_", copy)
