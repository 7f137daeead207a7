"""The soft limit of one call: it strikes that one, in time, once; not the next one, and not where it is put off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple, cast

import pytest

from fastq.pool.process import LIMIT_SIGNAL
from fastq.running.limit import SoftLimit
from fastq.wire.call import Call


class Struck(Exception):
    """What the limit raises."""


class Limited(NamedTuple):
    """What a limit reads of a call."""

    soft_time_limit: float
    started_s: float


def call_with(limit_s: float) -> Call:
    return cast("Call", Limited(limit_s, time.monotonic()))


@pytest.fixture(autouse=True)
def handler_is_put_back() -> Iterator[None]:
    before = signal.getsignal(LIMIT_SIGNAL)
    yield
    signal.signal(LIMIT_SIGNAL, before)


def limit(**options: Any) -> SoftLimit:
    made = SoftLimit(lambda call: Struck(call.soft_time_limit), **options)
    made.begin()
    return made


def test_a_call_that_runs_too_long_is_struck_once() -> None:
    def outlast() -> str:
        with pytest.raises(Struck, match=r"0\.05"):
            time.sleep(5)
        os.kill(os.getpid(), LIMIT_SIGNAL)  # a second one, from wherever
        return "went on"

    soft, call = limit(), call_with(0.05)
    assert soft.run(call, outlast, (), {}) == "went on"
    assert soft.has_struck(call)


def test_arguments_reach_the_function_whatever_their_names() -> None:
    named = {"call": 1, "function": 2, "self": 3, "args": 4, "kwargs": 5}
    assert limit().run(call_with(5), lambda *args, **kwargs: (args, kwargs), (0,), named) == ((0,), named)


def test_a_signal_that_comes_late_does_not_strike_the_next_call() -> None:
    soft = limit()
    first, second = call_with(0.05), call_with(5)
    soft.run(first, int, (), {})
    os.kill(os.getpid(), LIMIT_SIGNAL)  # while no call runs

    def meet_it() -> str:
        os.kill(os.getpid(), LIMIT_SIGNAL)
        return "untouched"

    assert soft.run(second, meet_it, (), {}) == "untouched"
    assert not soft.has_struck(first)
    assert not soft.has_struck(second)


def test_a_call_is_left_alone_behind_its_end() -> None:
    soft = limit()
    soft.run(call_with(0.05), int, (), {})
    time.sleep(0.1)  # the timer was stopped


def test_it_is_put_off_as_long_as_the_frame_is_spared() -> None:
    asked: list[str] = []

    def is_spared(frame: FrameType | None) -> bool:
        assert frame is not None
        asked.append(frame.f_code.co_name)
        return frame.f_code.co_name == "spared"

    def spared() -> float:
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass
        return until

    def outlast() -> float:
        spared_until = spared()
        try:
            time.sleep(5)
        except Struck:
            return spared_until
        raise AssertionError("not struck")

    spared_until = limit(is_spared=is_spared).run(call_with(0.02), outlast, (), {})
    assert spared_until <= time.monotonic() < spared_until + 2
    assert asked[0] == "spared"
    assert len(asked) > 2
