"""What every publisher must do, whatever broker is behind it; and more of those that a network lies before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import pytest

from fastq.brokers import open_publisher
from fastq.errors import FastqError, PublishError, SettingsError
from fastq.interfaces import Publisher
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests import ROOT
from tests.support.conformance import TIMEOUT_S, in_child, message
from tests.support.consumer_in_thread import within
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import free_ports

#: A publisher that does not wait for the broker.
BEHIND: Final[dict[str, Any]] = {"broker_transport_options": {"confirm_publish": "behind"}}


class PublisherConformance:
    """Fixtures to provide: ``url``, ``settings``."""

    #: Whether it can look into queues; else ``depth`` and ``purge`` raise a PublishError.
    looks_into_queues = True

    @pytest.fixture
    def publisher(self, url: str, settings: Settings) -> Iterator[Publisher]:
        publisher = open_publisher(url, settings)
        yield publisher
        publisher.close()

    @pytest.fixture
    def outside(self, url: str) -> Iterator[Publisher]:
        """Another publisher to the same broker, to look into the queues with."""
        publisher = open_publisher(url, Settings({}))
        yield publisher
        publisher.close()

    def stored(self, publisher: Publisher) -> None:
        """Return when everything is with the broker: that is when ``publish`` has returned, except behind."""

    def test_published_messages_wait_in_their_queue(self, publisher: Publisher, outside: Publisher) -> None:
        publisher.declare("celery")
        publisher.declare("other")
        publisher.publish([message(1), message(2), message(3, "other")])
        self.stored(publisher)
        assert (outside.depth("celery"), outside.depth("other")) == (2, 1)

    def test_a_message_waits_in_a_queue_that_nobody_has_declared(
        self, publisher: Publisher, outside: Publisher
    ) -> None:
        publisher.publish([message(1, "new")])
        publisher.publish([message(2, "new"), message(3, "newer")])
        self.stored(publisher)
        assert (outside.depth("new"), outside.depth("newer")) == (2, 1)

    def test_an_empty_batch_is_published(self, publisher: Publisher, outside: Publisher) -> None:
        publisher.publish([])
        outside.declare("celery")
        assert outside.depth("celery") == 0

    def test_declaring_twice_changes_nothing(self, publisher: Publisher, outside: Publisher) -> None:
        publisher.declare("celery")
        publisher.publish([message(1)])
        publisher.declare("celery")
        self.stored(publisher)
        assert outside.depth("celery") == 1

    def test_purge_drops_what_waits_in_one_queue_and_counts_it(self, publisher: Publisher, outside: Publisher) -> None:
        publisher.publish([message(1), message(2), message(3, "other")])
        self.stored(publisher)
        if self.looks_into_queues:
            assert (publisher.depth("celery"), publisher.depth("other")) == (2, 1)
            assert publisher.purge("celery") == 2
            assert (outside.depth("celery"), outside.depth("other")) == (0, 1)
            assert publisher.purge("celery") == 0
        else:
            for look in (publisher.depth, publisher.purge):
                with pytest.raises(PublishError, match="from inside a task"):
                    look("celery")
            assert (outside.depth("celery"), outside.depth("other")) == (2, 1)

    def test_a_queue_that_is_not_there_is_empty_or_named(self, publisher: Publisher) -> None:
        for look in (publisher.depth, publisher.purge):
            try:
                found = look("missing")
            except (SettingsError, PublishError) as error:
                found = 0 if "'missing'" in str(error) or not self.looks_into_queues else -1
            assert found == 0

    def test_a_batch_with_a_message_beyond_the_limit_is_refused(
        self, url: str, settings: Settings, outside: Publisher
    ) -> None:
        outside.declare("celery")
        strict = self.opened(url, settings.given() | {"fastq_max_message_bytes": 1000})
        try:
            with pytest.raises(PublishError, match="fastq_max_message_bytes allows 1000"):
                strict.publish([message("fits"), message("x" * 1000)])
        finally:
            strict.close()
        assert outside.depth("celery") == 0

    def opened(self, url: str, settings: dict[str, Any]) -> Publisher:
        return open_publisher(url, Settings(settings))

    def test_a_closed_publisher_opens_again(self, publisher: Publisher, outside: Publisher) -> None:
        publisher.declare("celery")
        publisher.close()
        publisher.publish([message(1)])
        self.stored(publisher)
        assert outside.depth("celery") == 1

    def test_threads_publish_side_by_side(self, publisher: Publisher, outside: Publisher) -> None:
        threads = [
            threading.Thread(target=lambda: [publisher.publish([message(n)]) for n in range(25)], daemon=True)
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        self.stored(publisher)
        assert outside.depth("celery") == 100


class SharedPublisherConformance(PublisherConformance):
    """Of brokers that other processes reach too."""

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    def test_a_forked_process_has_a_connection_of_its_own(self, publisher: Publisher, outside: Publisher) -> None:
        publisher.publish([message(1)])

        def publish_and_leave() -> None:
            publisher.publish([message(2)])
            publisher.close()

        assert in_child(publish_and_leave) == "returned None"
        publisher.publish([message(3)])
        self.stored(publisher)
        assert outside.depth("celery") == 3

    def test_a_script_that_ends_at_once_has_its_messages_stored(
        self, url: str, settings: Settings, outside: Publisher
    ) -> None:
        script = (
            "from fastq import FastQ\n"
            f"app = FastQ('script', broker={url!r}, **{settings.given()!r})\n"
            "for _ in range(100): app.send_task('t', queue='celery')\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", script], check=True, timeout=30, env=environment)
        assert outside.depth("celery") == 100


class ServerPublisherConformance(SharedPublisherConformance):
    """Of brokers that are servers: connections are lost, and servers are away or silent."""

    #: fastq_publish_timeout of the one behind a proxy.
    timeout_s = 10.0

    @pytest.fixture
    def proxy(self, url: str) -> Iterator[FaultProxy]:
        parts = urlsplit(url)
        with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
            yield proxy

    @pytest.fixture
    def distant(self, url: str, settings: Settings, proxy: FaultProxy) -> Iterator[Publisher]:
        """A publisher through the proxy; one message has gone through."""
        publisher = self.opened(proxy.url(url), {**settings.given(), "fastq_publish_timeout": self.timeout_s})
        publisher.publish([message("first")])
        self.stored(publisher)
        yield publisher
        proxy.resume()
        publisher.close()

    def test_an_idle_connection_that_was_cut_is_replaced(
        self, proxy: FaultProxy, distant: Publisher, outside: Publisher
    ) -> None:
        proxy.cut()
        time.sleep(0.2)  # longer than a connection may be idle without being looked at
        distant.publish([message("second")])
        self.stored(distant)
        assert outside.depth("celery") == 2

    def test_a_server_that_is_away_is_the_callers_error(self, url: str, settings: Settings, outside: Publisher) -> None:
        outside.declare("celery")
        parts = urlsplit(url)
        away = self.opened(url.replace(f":{parts.port}", f":{free_ports(1)}"), settings.given())
        for _ in range(2):
            with pytest.raises(FastqError, match=r"cannot connect|cannot be reached|Is it running"):
                away.publish([message(1)])
        away.close()
        assert outside.depth("celery") == 0


class WaitingPublisherConformance(ServerPublisherConformance):
    """Of those that return when the broker has confirmed."""

    @pytest.mark.parametrize("count", [1, 20])
    def test_a_silent_server_ends_it_at_the_deadline(self, count: int, proxy: FaultProxy, distant: Publisher) -> None:
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(FastqError) as caught:
            distant.publish([message(n) for n in range(count)], began + 0.3)
        assert 0.2 < time.monotonic() - began < self.timeout_s / 2
        assert isinstance(caught.value, PublishError)
        # They may still arrive: to send them again would be to run them twice.
        assert caught.value.again == ()

    def test_a_silent_server_ends_declaring_at_the_deadline(self, proxy: FaultProxy, distant: Publisher) -> None:
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(FastqError):
            distant.declare("another", began + 0.3)
        assert 0.2 < time.monotonic() - began < self.timeout_s / 2

    def test_a_connection_that_is_lost_before_the_answer_leaves_the_fate_open(
        self, proxy: FaultProxy, distant: Publisher, outside: Publisher
    ) -> None:
        proxy.stall()
        cutting = threading.Timer(0.2, proxy.cut)
        cutting.start()
        with pytest.raises(PublishError, match="may or may not have been stored"):
            distant.publish([message("second")])
        cutting.join()
        proxy.resume()
        distant.publish([message("third")])
        assert outside.depth("celery") == 2


class BehindPublisherConformance(ServerPublisherConformance):
    """Of those that return at once: nothing waits but for room, nothing is lost when the connection is.

    Set ``window``: how many messages may be unanswered.
    """

    window: int
    timeout_s = 1.0  # after it a warning, or an error, is due

    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(BEHIND)

    def stored(self, publisher: Any) -> None:
        assert publisher.flush(TIMEOUT_S) == 0

    def test_every_message_is_stored(self, publisher: Publisher, outside: Publisher) -> None:
        for _ in range(self.window):
            publisher.publish([message(1)])
        publisher.publish([message(2) for _ in range(2 * self.window)])
        self.stored(publisher)
        assert outside.depth("celery") == 3 * self.window

    def test_what_was_not_answered_when_the_connection_was_cut_is_sent_again(
        self, proxy: FaultProxy, distant: Publisher, outside: Publisher
    ) -> None:
        proxy.stall()
        for _ in range(20):
            distant.publish([message(1)])
        assert outside.depth("celery") == 1
        proxy.cut()
        proxy.resume()
        # Nobody calls the publisher again: its watcher notices.
        assert within(TIMEOUT_S, lambda: outside.depth("celery") >= 21)
        self.stored(distant)
        assert outside.depth("celery") == 21

    def test_a_server_that_is_slow_to_answer_is_not_sent_its_messages_twice(
        self, proxy: FaultProxy, distant: Publisher, outside: Publisher, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.hold_replies()
        distant.publish([message(1) for _ in range(20)])
        assert within(TIMEOUT_S, lambda: "still waiting" in caplog.text)
        proxy.resume()
        self.stored(distant)
        assert proxy.connections == 1
        assert outside.depth("celery") == 21

    def test_a_full_window_is_an_error_and_nothing_more_is_sent(
        self, proxy: FaultProxy, distant: Publisher, outside: Publisher
    ) -> None:
        proxy.hold_replies()
        distant.publish([message(1) for _ in range(self.window)])
        began = time.monotonic()
        with pytest.raises(PublishError, match=rf"not published: .* {self.window} message") as caught:
            distant.publish([message(2)], began + 0.3)
        assert time.monotonic() - began < 5
        assert caught.value.again is None
        proxy.resume()
        self.stored(distant)
        assert proxy.connections == 1
        assert outside.depth("celery") == 1 + self.window

    def test_a_server_that_reads_nothing_is_not_sent_its_messages_twice(
        self, proxy: FaultProxy, distant: Publisher, outside: Publisher
    ) -> None:
        large = [encode_task("t", new_id(), bytes(6 << 20), routing_key="celery") for _ in range(4)]
        proxy.stall()
        distant.publish([message(1)])
        with pytest.raises(PublishError, match="may still be stored") as caught:  # more than the sockets hold
            distant.publish(large)
        assert caught.value.again == ()
        with pytest.raises(PublishError, match="not published") as caught:
            distant.publish([message(2)])
        assert caught.value.again is None
        proxy.resume()
        distant.publish([message(3)])  # behind the others
        self.stored(distant)
        assert proxy.connections == 1
        assert outside.depth("celery") == 3 + len(large)

    def test_what_the_caller_has_heard_of_is_not_tried_again_behind_its_back(
        self, url: str, settings: Settings
    ) -> None:
        parts = urlsplit(url)
        away: Any = self.opened(url.replace(f":{parts.port}", f":{free_ports(1)}"), settings.given())
        with pytest.raises(FastqError):
            away.publish([message(1)])
        assert away.flush(0) == 0
        away.close()
