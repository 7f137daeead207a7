"""RabbitMQ and the suites that every broker passes."""

from __future__ import annotations

import pytest

from fastq.brokers import open_publisher
from fastq.brokers.rabbitmq.behind import WINDOW, BehindPublisher
from fastq.settings import Settings
from tests.support.conformance.async_publishers import ServerAsyncPublisherConformance
from tests.support.conformance.consumers import ServerConsumerConformance
from tests.support.conformance.leases import LeaseConformance
from tests.support.conformance.publishers import BehindPublisherConformance, WaitingPublisherConformance

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
def url(amqp_url: str) -> str:
    return amqp_url


@pytest.fixture
def settings() -> Settings:
    return Settings({"task_queues": [{"name": "urgent", "max_priority": 9}]})


class TestPublisher(WaitingPublisherConformance):
    pass


class TestBehindPublisher(BehindPublisherConformance):
    window = WINDOW

    def test_it_is_the_one_behind(self, url: str, settings: Settings) -> None:
        assert isinstance(open_publisher(url, settings), BehindPublisher)


class TestAsyncPublisher(ServerAsyncPublisherConformance):
    pass


class TestConsumer(ServerConsumerConformance):
    keeps_eta = False
    changes_queues = True


class TestLease(LeaseConformance):
    pass
