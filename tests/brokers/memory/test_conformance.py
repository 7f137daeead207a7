"""memory:// and the suites that every broker and every store passes."""

from __future__ import annotations

import pytest

from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance.async_publishers import AsyncPublisherConformance
from tests.support.conformance.consumers import SavingConsumerConformance
from tests.support.conformance.publishers import PublisherConformance
from tests.support.conformance.stores import StoreConformance


@pytest.fixture
def url() -> str:
    return f"memory://{new_id()}"


@pytest.fixture
def settings() -> Settings:
    return Settings()


class TestPublisher(PublisherConformance):
    pass


class TestAsyncPublisher(AsyncPublisherConformance):
    pass


class TestConsumer(SavingConsumerConformance):
    pass


class TestStore(StoreConformance):
    pass
