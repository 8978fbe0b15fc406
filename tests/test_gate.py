"""The gate of an environment: many threads inside together, or one alone."""

from __future__ import annotations

import threading

import pytest

from tierkv.errors import StoreBusyError
from tierkv.storage.lmdb_lock import Gate

WAIT_S = 10.0


def test_a_thread_that_wants_to_be_alone_is_woken_by_the_last_one_that_leaves() -> None:
    gate, found = Gate(WAIT_S), list[bool]()

    def be_alone() -> None:
        with gate.exclusive(WAIT_S) as is_alone:
            found.append(is_alone)

    with gate.shared():
        with gate.shared():  # a second use, such as another thread's
            waiting = threading.Thread(target=be_alone)
            waiting.start()
            while not gate._closed:
                pass
        assert not found, "one use is left"
    waiting.join(WAIT_S / 2)
    assert found == [True], "not woken before its wait ends"


def test_a_thread_that_is_alone_keeps_others_outside_until_it_leaves() -> None:
    gate = Gate(0.01)
    with gate.exclusive(0.01) as is_alone:
        assert is_alone
        refused: list[bool] = []

        def enter() -> None:
            with pytest.raises(StoreBusyError), gate.shared():
                pass
            refused.append(True)

        other = threading.Thread(target=enter)
        other.start()
        other.join()
        assert refused == [True]
    with gate.shared():
        pass


def test_a_use_that_fails_leaves_the_gate() -> None:
    gate = Gate(0.01)
    with pytest.raises(KeyError), gate.shared():
        raise KeyError
    with gate.exclusive(0.01) as is_alone:
        assert is_alone
