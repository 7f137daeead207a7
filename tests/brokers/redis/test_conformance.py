"""Redis and the suites that every broker passes."""

from __future__ import annotations

import pytest
import redis as redis_py

from fastq.brokers import open_publisher
from fastq.brokers.redis import lease
from fastq.brokers.redis.behind import WINDOW, RedisBehindPublisher
from fastq.settings import Settings
from tests.support.conformance.async_publishers import ServerAsyncPublisherConformance
from tests.support.conformance.consumers import ServerConsumerConformance
from tests.support.conformance.leases import LeaseConformance
from tests.support.conformance.publishers import BehindPublisherConformance, WaitingPublisherConformance
from tests.support.servers import Redis

pytestmark = pytest.mark.redis


@pytest.fixture
def url(redis_server: Redis) -> str:
    """An empty database."""
    url = redis_server.url(3)
    with redis_py.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def settings() -> Settings:
    return Settings({"task_queues": [{"name": "bound", "exchange": "bindings"}]})


class TestPublisher(WaitingPublisherConformance):
    pass


class TestBehindPublisher(BehindPublisherConformance):
    window = WINDOW

    def test_it_is_the_one_behind(self, url: str, settings: Settings) -> None:
        assert isinstance(open_publisher(url, settings), RedisBehindPublisher)


class TestAsyncPublisher(ServerAsyncPublisherConformance):
    pass


class TestConsumer(ServerConsumerConformance):
    #: With kombu's Redis the lower number is the more urgent one, in four steps.
    priorities = (0, 3, 9)
    keeps_eta = False
    changes_queues = True


class TestLease(LeaseConformance):
    survives_standstill = False
    back_within_s = 10.0

    @pytest.fixture(autouse=True)
    def short_leases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "LEASE_S", self.lease_s)
        monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.3)
        monkeypatch.setattr(lease, "GRACE_S", 0.3)
