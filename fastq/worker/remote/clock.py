"""The Lamport clock that a worker's events and remote control share. For the event loop's thread alone: no lock.

Source: Lamport, "Time, Clocks, and the Ordering of Events in a Distributed System" (1978), rules IR1 and IR2.
"""

from __future__ import annotations

from typing import Final

#: What a peer claims beyond this is not believed: a clock that jumps there could not count on in 64 bits.
_MAX: Final = 2**62


class LamportClock:
    """A counter that grows with every message sent and jumps past that of every message received."""

    __slots__ = ("value",)

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def forward(self) -> int:
        """Count one step, before something is sent, and return the new value."""
        self.value += 1
        return self.value

    def adjust(self, other: object) -> int:
        """Jump past what a peer sent and return the new value; a value that is no clock's counts as one step."""
        if isinstance(other, int) and not isinstance(other, bool) and self.value < other < _MAX:
            self.value = other
        return self.forward()
