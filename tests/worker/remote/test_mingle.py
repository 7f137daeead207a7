"""Mingle: what a worker asks the others at its start, and what it takes from their answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from fastq.errors import ConnectionLost
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.mingle import mingle


class MemoryNodes:
    """Other workers, as far as their answers go."""

    def __init__(self, *replies: tuple[str, Any]) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[str, Mapping[str, Any], float]] = []

    async def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float) -> list[tuple[str, Any]]:
        self.asked.append((method, arguments, timeout_s))
        return self.replies


def meet(*replies: tuple[str, Any], revoked: Iterable[str] = ()) -> tuple[int, LamportClock, list[str], MemoryNodes]:
    """Return how many answered, the clock and the ids taken, and the nodes that were asked."""
    nodes, clock, taken = MemoryNodes(*replies), LamportClock(5), []
    count = asyncio.run(mingle(nodes, "w@h", "i-1", clock, revoked, taken.extend))
    return count, clock, taken, nodes


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastq.worker")


def test_the_question_is_celery_s_hello() -> None:
    _, _, _, nodes = meet(revoked=["id-1", "id-2"])
    assert nodes.asked == [("hello", {"from_node": "w@h", "revoked": ["id-1", "id-2"], "instance": "i-1"}, 1.0)]


def test_alone_there_is_nothing_to_take(caplog: pytest.LogCaptureFixture) -> None:
    count, clock, taken, _ = meet(("w@h", {"clock": 900, "revoked": ["own"]}))
    assert (count, clock.value, taken) == (0, 5, [])
    assert lines(caplog) == ["mingle: searching for neighbors", "mingle: all alone"]


def test_clocks_and_revoked_ids_of_the_others_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    count, clock, taken, _ = meet(
        ("a@h", {"clock": 70, "revoked": ["x", "y"]}),
        ("w@h", {"clock": 9000, "revoked": ["own"]}),
        ("b@h", {"clock": 40, "revoked": {"z": 12.5}}),  # workers before Celery 5.7
    )
    assert (count, taken) == (2, ["x", "y", "z"])
    assert 71 <= clock.value <= 73
    assert lines(caplog)[1:] == ["mingle: sync with 2 nodes", "mingle: sync complete"]


@pytest.mark.parametrize(
    "reply",
    [None, "ok", [], {}, {"error": "KeyError('hello')"}, {"clock": "late", "revoked": 7}, {"clock": True},
     {"clock": -3, "revoked": [1, None, "x" * 9]}, {"clock": 2**70}, {"revoked": "text"}],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_does_no_harm(reply: Any) -> None:
    _, clock, taken, _ = meet(("a@h", reply), ("b@h", {"clock": 10, "revoked": ["good"]}))
    assert taken[-1] == "good"
    assert 11 <= clock.value <= 13
    assert all(isinstance(each, str) for each in taken)


def test_a_broker_that_goes_away_is_the_caller_s_to_handle() -> None:
    class Lost(MemoryNodes):
        async def ask(self, *arguments: Any) -> list[tuple[str, Any]]:
            raise ConnectionLost("gone")

    with pytest.raises(ConnectionLost):
        asyncio.run(mingle(Lost(), "w@h", "i-1", LamportClock(), (), lambda ids: None))


# -- the clock


def test_a_clock_counts_and_jumps_past_what_it_hears() -> None:
    clock = LamportClock()
    assert (clock.forward(), clock.forward(), clock.adjust(10), clock.adjust(3), clock.value) == (1, 2, 11, 12, 12)


@pytest.mark.parametrize("other", [None, "7", 1e9, True, -1, 2**62, 2**400])
def test_a_value_that_is_no_clock_s_is_one_step(other: object) -> None:
    assert LamportClock(3).adjust(other) == 4
