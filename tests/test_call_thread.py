"""Calls that may never return: waited for so long, undone if they come too late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tierkv.background.call_thread import CallThread
from tierkv.errors import ClosedError, StoreError

HANG_S = 30.0


def test_results_and_errors_are_those_of_the_call() -> None:
    with CallThread("a test", wait_s=HANG_S) as calls:
        assert calls.call(lambda: 7) == 7
        assert calls.call(lambda: None) is None
        with pytest.raises(ZeroDivisionError):
            calls.call(lambda: 1 // 0)
        with pytest.raises(KeyboardInterrupt):
            calls.call(interrupt)
        assert calls.call(threading.current_thread) is not threading.current_thread()


def test_a_call_that_does_not_return_is_an_error_and_so_are_those_behind_it() -> None:
    may_go_on, undone = threading.Event(), threading.Event()
    results: list[object] = []

    def slow() -> str:
        assert may_go_on.wait(HANG_S)
        return "late"

    def undo(result: str) -> None:
        results.append(result)
        undone.set()

    with CallThread("a test", wait_s=0.05) as calls:
        with pytest.raises(StoreError, match="a test: there has been no answer for"):
            calls.call(slow, undo=undo)
        start = time.monotonic()
        with pytest.raises(StoreError, match="has not returned"):
            calls.call(lambda: results.append("never"))
        calls.clean_up(lambda: results.append("cleaned up"))
        assert time.monotonic() - start < HANG_S / 2
        assert not results
    may_go_on.set()
    assert undone.wait(HANG_S)
    wait_until(lambda: results == ["late", "cleaned up"])


def test_a_call_is_given_up_when_its_caller_must_end() -> None:
    may_go_on, must_end = threading.Event(), threading.Event()
    with CallThread("a test", wait_s=HANG_S, must_end=must_end.is_set) as calls:
        threading.Timer(0.05, must_end.set).start()
        with pytest.raises(ClosedError):
            calls.call(lambda: may_go_on.wait(HANG_S))
    may_go_on.set()


def test_what_is_cleaned_up_while_nothing_is_stuck_is_done_on_return() -> None:
    done: list[int] = []
    with CallThread("a test", wait_s=HANG_S) as calls:
        calls.clean_up(lambda: done.append(1))
        assert done == [1]
        calls.clean_up(lambda: 1 // 0)


def test_its_thread_ends_with_it() -> None:
    with CallThread("a test", wait_s=HANG_S) as calls:
        thread = calls.call(threading.current_thread)
    thread.join(HANG_S)
    assert not thread.is_alive()


def interrupt() -> None:
    raise KeyboardInterrupt


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
