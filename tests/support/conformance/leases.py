"""What is taken stays with a consumer that lives, and comes back from one that is gone: by a lease or otherwise.

For every broker that several processes use.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from fastq.brokers import open_publisher
from fastq.interfaces import Publisher
from fastq.link import ACK
from fastq.settings import Settings
from tests.support.conformance import message
from tests.support.conformance.consumers import bodies
from tests.support.holder import Holder
from tests.support.tapped_consumer import TappedConsumer


class LeaseConformance:
    """Fixtures to provide: ``url``; in this process leases last ``lease_s``, for brokers that have any."""

    #: How long a lease lasts here.
    lease_s = 1.0
    #: How long it takes at most until what a killed one held is with somebody else.
    back_within_s = 5.0
    #: Whether one that stands still for longer than a lease keeps what it holds.
    survives_standstill = True

    @pytest.fixture
    def publisher(self, url: str) -> Iterator[Publisher]:
        publisher = open_publisher(url, Settings())
        yield publisher
        publisher.close()

    @pytest.fixture
    def other(self, url: str) -> Iterator[TappedConsumer]:
        """Who would take over."""
        with TappedConsumer(url, Settings()) as consumer:
            yield consumer

    @pytest.fixture
    def holder(self, url: str, publisher: Publisher) -> Iterator[Holder]:
        """A process that holds three messages."""
        publisher.publish([message(n) for n in range(3)])
        with Holder(url, 3, self.lease_s) as holder:
            yield holder

    def test_what_a_killed_one_held_comes_again_in_order_and_counted(
        self, holder: Holder, other: TappedConsumer
    ) -> None:
        holder.kill()
        again = other.arrived(3, self.back_within_s)
        assert [(each.body, each.deliveries) for each in again] == [(b"0", 2), (b"1", 2), (b"2", 2)]

    def test_what_a_slow_one_holds_stays_with_it(self, holder: Holder, other: TappedConsumer) -> None:
        time.sleep(3 * self.lease_s)
        assert other.all() == []
        assert holder.do("ack") == "acked"
        holder.leave()
        time.sleep(2 * self.lease_s)
        assert bodies(other.all()) == []

    def test_what_one_that_leaves_held_comes_at_once(
        self, url: str, publisher: Publisher, other: TappedConsumer
    ) -> None:
        other.close()
        publisher.publish([message(1)])
        leaving = TappedConsumer(url, Settings())
        leaving.arrived(1)
        with TappedConsumer(url, Settings()) as staying:
            leaving.close()
            assert staying.bodies(1, 1.0) == ["1"]

    def test_one_that_stood_still_keeps_what_it_holds_or_hears_that_it_has_lost_it(
        self, holder: Holder, other: TappedConsumer, publisher: Publisher
    ) -> None:
        os.kill(holder.pid, signal.SIGSTOP)
        try:
            if self.survives_standstill:
                time.sleep(2 * self.lease_s)
                assert other.all() == []
            else:
                other.arrived(3, self.back_within_s)
        finally:
            os.kill(holder.pid, signal.SIGCONT)
        assert holder.do("ack") == "acked"
        if not self.survives_standstill:
            assert "taken for dead" in holder.do("lost")
            # What it has settled is the other's: it is still held there, and settled once.
            assert other.held == 3
            other.settle(ACK, *other.so_far())
        holder.leave()
        assert len(other.all()) == (0 if self.survives_standstill else 3)
        assert publisher.depth("celery") == 0
