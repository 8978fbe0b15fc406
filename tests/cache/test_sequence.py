from __future__ import annotations

from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier


class Copy:
    """A copy that is done when it is told to be."""

    def __init__(self) -> None:
        self.is_over = False
        self.waited: list[int | None] = []

    def wait(self, layer: int | None = None) -> None:
        self.waited.append(layer)

    def synchronize(self) -> None:
        self.is_over = True

    def is_done(self) -> bool:
        return self.is_over


class Owner:
    """A cache that notes what it is to release."""

    def __init__(self) -> None:
        self.released: list[Sequence] = []

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence)

    def next_piece(self, sequence: Sequence, *, wait: bool) -> range:
        raise AssertionError

    def record(self, sequence: Sequence, seconds: float, *, num_tokens: int | None) -> None:
        raise AssertionError


def sequence_with(*copies: Copy) -> Sequence:
    return Sequence(Owner(), bytearray(16), [0], 4, dict.fromkeys(Tier, 0), [], 4, loads=list(copies))


def test_a_layer_waits_for_copies_that_are_on_their_way_and_forgets_those_that_are_done() -> None:
    done, coming = Copy(), Copy()
    sequence = sequence_with(done, coming)
    done.is_over = True
    sequence.wait_layer(0)
    sequence.wait_layer(1)
    assert (done.waited, coming.waited) == ([], [0, 1])
    coming.is_over = True
    sequence.wait_layer(2)
    assert sequence.loads == []
    assert coming.waited == [0, 1]


def test_waiting_for_everything_leaves_nothing_to_wait_for() -> None:
    coming = Copy()
    sequence = sequence_with(coming)
    sequence.wait_all()
    sequence.wait_layer(0)
    assert coming.waited == [None]


def test_a_sequence_releases_itself_at_the_end_of_a_with_statement() -> None:
    sequence = sequence_with()
    with sequence as entered:
        assert entered is sequence
        assert sequence.owner.released == []  # type: ignore[attr-defined]
    assert sequence.owner.released == [sequence]  # type: ignore[attr-defined]
