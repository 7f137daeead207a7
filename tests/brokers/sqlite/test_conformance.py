"""sqlite:// and the suites that every broker and every store passes."""

from __future__ import annotations

import pytest

from fastq.settings import Settings
from tests.support.conformance.async_publishers import AsyncPublisherConformance
from tests.support.conformance.consumers import SavingConsumerConformance
from tests.support.conformance.leases import LeaseConformance
from tests.support.conformance.publishers import SharedPublisherConformance
from tests.support.conformance.stores import WaitingConformance


@pytest.fixture
def url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def settings() -> Settings:
    return Settings()


class TestPublisher(SharedPublisherConformance):
    pass


class TestAsyncPublisher(AsyncPublisherConformance):
    pass


class TestConsumer(SavingConsumerConformance):
    pass


class TestStore(WaitingConformance):
    pass


class TestLease(LeaseConformance):
    pass
