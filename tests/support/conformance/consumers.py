"""What every consumer must do, whatever broker is behind it; told and heard through the seam alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from fastq.brokers import open_publisher
from fastq.errors import ConnectionLost, SettingsError
from fastq.interfaces import Publisher, ResultStore
from fastq.link import ACK, REJECT, REQUEUE, RETURN
from fastq.queues import Topology
from fastq.results import open_store
from fastq.settings import Settings
from fastq.wire.head import scan
from fastq.wire.ids import new_id
from tests.support.conformance import TIMEOUT_S, message, meta_of
from tests.support.consumer_in_thread import within
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import free_ports
from tests.support.tapped_consumer import Arrived, TappedConsumer

OpenConsumer = Callable[..., TappedConsumer]


def bodies(arrived: list[Arrived]) -> list[str]:
    return [each.body.decode() for each in arrived]


class ConsumerConformance:
    """Fixtures to provide: ``url``, ``settings``; a queue ``urgent`` is to keep priorities apart."""

    #: Three priorities, the most urgent first.
    priorities = (9, 5, 0)
    #: Whether messages with an ETA stay with the broker until they are due; else the message loop keeps them.
    keeps_eta = True
    #: Whether it is told to add and leave queues while it runs; else it refuses.
    changes_queues = False

    @pytest.fixture
    def publisher(self, url: str, settings: Settings) -> Iterator[Publisher]:
        publisher = open_publisher(url, settings)
        yield publisher
        publisher.close()

    @pytest.fixture
    def open_consumer(self, url: str, settings: Settings) -> Iterator[OpenConsumer]:
        """A function that opens a consumer of queues; all are closed afterwards."""
        opened: list[TappedConsumer] = []

        def open_consumer(*queues: str, window: int = 100) -> TappedConsumer:
            opened.append(TappedConsumer(url, settings, queues or ("celery",), window))
            return opened[-1]

        yield open_consumer
        for consumer in opened:
            consumer.close()

    @pytest.fixture
    def consumer(self, open_consumer: OpenConsumer) -> TappedConsumer:
        return open_consumer()

    @pytest.fixture
    def after(self, publisher: Publisher, open_consumer: OpenConsumer) -> Callable[[], list[str]]:
        """A function that returns what a queue holds for the next consumer, by publishing one more behind it."""

        def after() -> list[str]:
            publisher.publish([message("the last")])
            following = open_consumer()
            arrived = following.until(lambda arrived: "the last" in bodies(arrived))
            return sorted(bodies(arrived))[:-1]

        return after

    # --- receiving

    def test_a_delivery_is_the_message_as_it_was_published(
        self, publisher: Publisher, consumer: TappedConsumer
    ) -> None:
        sent = message("body", headers={"trace": "ü"})
        publisher.publish([sent])
        (each,) = consumer.arrived(1)
        assert (each.queue, each.props, each.body, each.deliveries) == ("celery", sent.props, sent.body, 1)
        assert consumer.held == 1

    @pytest.mark.parametrize("size", [0, 1, 131_065, 1_000_000])
    def test_a_body_of_any_size_arrives_whole(self, size: int, publisher: Publisher, consumer: TappedConsumer) -> None:
        publisher.publish([message("x" * size)])
        assert consumer.bodies(1) == ["x" * size]

    def test_messages_come_in_the_order_of_publishing(self, publisher: Publisher, consumer: TappedConsumer) -> None:
        publisher.publish([message(n) for n in range(30)])
        for n in range(30, 40):
            publisher.publish([message(n)])
        assert consumer.bodies(40) == [str(n) for n in range(40)]

    def test_what_is_more_urgent_comes_first(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        first, second, third = self.priorities
        for priority in (third, first, second, third, first):
            publisher.publish([message(priority, "urgent", priority=priority)])
        assert open_consumer("urgent").bodies(5) == [str(each) for each in (first, first, second, third, third)]

    def test_the_more_urgent_comes_first_whenever_there_is_room(
        self, publisher: Publisher, open_consumer: OpenConsumer
    ) -> None:
        publisher.publish([message(n % 3, "urgent", priority=self.priorities[n % 3]) for n in range(9)])
        consumer = open_consumer("urgent", window=2)
        for count in (2, 4, 6, 8):
            consumer.settle(ACK, *consumer.arrived(count)[count - 2 :])
        assert consumer.bodies(9) == ["0"] * 3 + ["1"] * 3 + ["2"] * 3

    def test_no_more_are_here_unsettled_than_the_window_has_room_for(
        self, publisher: Publisher, open_consumer: OpenConsumer
    ) -> None:
        publisher.publish([message(n) for n in range(10)])
        consumer = open_consumer(window=3)
        assert bodies(consumer.all()) == ["0", "1", "2"]
        consumer.settle(ACK, *consumer.arrived(3)[:2])
        assert bodies(consumer.all()) == ["0", "1", "2", "3", "4"]
        assert consumer.held == 3
        assert publisher.depth("celery") == 5

    def test_only_listed_queues_are_received_from(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        publisher.publish([message("a", "alpha"), message("b", "beta"), message("c", "gamma")])
        consumer = open_consumer("alpha", "gamma")
        assert {each.queue: each.body for each in consumer.all()} == {"alpha": b"a", "gamma": b"c"}
        assert publisher.depth("beta") == 1

    def test_a_long_queue_does_not_hold_up_a_short_one(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        publisher.publish([message("long", "long") for _ in range(200)] + [message("short", "short") for _ in range(5)])
        arrived = open_consumer("long", "short", window=20).until(lambda all_: bodies(all_).count("short") == 5)
        assert bodies(arrived).count("long") <= 20

    def test_two_consumers_share_a_queue(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        first, second = open_consumer(window=30), open_consumer(window=30)
        publisher.publish([message(n) for n in range(60)])
        assert sorted(first.bodies(30) + second.bodies(30), key=int) == [str(n) for n in range(60)]

    def test_the_window_grows_and_shrinks(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        publisher.publish([message(n) for n in range(30)])
        consumer = open_consumer(window=2)
        consumer.arrived(2)
        consumer.set_prefetch(6)
        consumer.arrived(6)
        # With AMQP a new limit does not count what is here already.
        assert 6 <= len(consumer.all()) <= 8
        consumer.set_prefetch(1)
        consumer.settle(ACK, *consumer.all())
        consumer.all()
        assert consumer.held == 1

    # --- verdicts

    def test_what_is_done_is_gone(
        self, publisher: Publisher, open_consumer: OpenConsumer, after: Callable[[], list[str]]
    ) -> None:
        publisher.publish([message(n) for n in range(100)])
        first = open_consumer()
        first.settle(ACK, *first.arrived(100)[1:50])
        first.settle(ACK, *first.arrived(100)[50:], first.arrived(100)[0])
        assert first.held == 0
        first.close()
        assert after() == []

    def test_what_is_given_back_comes_again_in_its_old_place_and_counted(
        self, publisher: Publisher, open_consumer: OpenConsumer
    ) -> None:
        publisher.publish([message(n) for n in range(4)])
        consumer = open_consumer(window=2)
        one, two = consumer.arrived(2)
        consumer.settle(REQUEUE, two)
        again = consumer.arrived(3)[2]
        assert (again.body, again.deliveries) == (b"1", 2)
        consumer.settle(ACK, one, again)
        assert [(each.body, each.deliveries) for each in consumer.arrived(5)[3:]] == [(b"2", 1), (b"3", 1)]

    def test_what_was_not_started_comes_again(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        sent = [message(n) for n in range(5)]
        publisher.publish(sent)
        first, second = open_consumer(), open_consumer()
        assert within(TIMEOUT_S, lambda: len(first.so_far()) + len(second.so_far()) == 5)
        first.cancel()
        first.settle(RETURN, *first.so_far())
        again = second.arrived(5)
        assert sorted(bodies(again)) == [str(n) for n in range(5)]
        assert {each.props for each in again} == {each.props for each in sent}

    def test_what_is_rejected_does_not_come_again(
        self, publisher: Publisher, open_consumer: OpenConsumer, after: Callable[[], list[str]]
    ) -> None:
        publisher.publish([message(1), message(2)])
        first = open_consumer()
        one, two = first.arrived(2)
        first.settle(REJECT, one)
        first.settle(ACK, two)
        first.close()
        assert after() == []

    def test_what_is_not_settled_goes_back_on_close(self, publisher: Publisher, open_consumer: OpenConsumer) -> None:
        publisher.publish([message(1), message(2)])
        first = open_consumer()
        first.settle(ACK, first.arrived(2)[0])
        first.close()
        (each,) = open_consumer().arrived(1)
        assert (each.body, each.deliveries) == (b"2", 2)

    def test_nothing_new_comes_after_cancel(self, publisher: Publisher, consumer: TappedConsumer) -> None:
        publisher.publish([message(1)])
        (each,) = consumer.arrived(1)
        consumer.cancel()
        publisher.publish([message(2)])
        consumer.settle(ACK, each)
        assert len(consumer.all()) == 1
        assert publisher.depth("celery") == 1

    # --- what waits for its time

    def test_a_delayed_message_is_here_when_it_is_due_and_holds_nobody_up(
        self, publisher: Publisher, consumer: TappedConsumer
    ) -> None:
        due = time.time() + 1.0
        publisher.publish([message("later", eta=due), message("now")])
        consumer.until(lambda arrived: "now" in bodies(arrived))
        assert publisher.depth("celery") == (1 if self.keeps_eta else 0)
        arrived = consumer.arrived(2)
        assert time.time() - due < 0.5
        if self.keeps_eta:
            assert time.time() >= due
        (later,) = [each for each in arrived if each.body == b"later"]
        assert scan(later.props)["eta"] == pytest.approx(due, abs=0.001)

    def test_a_delayed_message_that_expires_first_is_here_when_it_expires(
        self, publisher: Publisher, consumer: TappedConsumer
    ) -> None:
        expires = time.time() + 0.4
        publisher.publish([message("never", eta=expires + 3600, expires=expires)])
        assert consumer.bodies(1) == ["never"]
        assert time.time() >= expires or not self.keeps_eta

    def test_an_eta_in_the_past_is_due(self, publisher: Publisher, consumer: TappedConsumer) -> None:
        publisher.publish([message(1, eta=time.time() - 5)])
        assert consumer.bodies(1, 2.0) == ["1"]

    # --- sending

    def test_follow_ups_are_published_and_confirmed(self, publisher: Publisher, consumer: TappedConsumer) -> None:
        publisher.publish([message(1)])
        (owner,) = consumer.arrived(1)
        consumer.publish(owner, message("a", "next"), message("b", "next"), message("c", "another"))
        assert consumer.fate(owner, 3) == [True] * 3
        assert (publisher.depth("next"), publisher.depth("another")) == (2, 1)

    def test_follow_ups_to_an_own_queue_are_received(self, consumer: TappedConsumer) -> None:
        consumer.publish(None, message("again"))
        assert consumer.bodies(1) == ["again"]

    def test_many_follow_ups_are_confirmed(self, publisher: Publisher, consumer: TappedConsumer) -> None:
        publisher.publish([message(1)])
        (owner,) = consumer.arrived(1)
        consumer.publish(owner, *(message(n, "next") for n in range(1000)))
        assert consumer.fate(owner, 1000) == [True] * 1000
        assert publisher.depth("next") == 1000

    def test_a_consumer_without_queues_publishes(
        self, publisher: Publisher, open_consumer: OpenConsumer, url: str, settings: Settings
    ) -> None:
        publisher.publish([message(1)])
        with TappedConsumer(url, settings, queues=()) as consumer:
            consumer.publish(None, message(2))
            assert within(TIMEOUT_S, lambda: publisher.depth("celery") == 2)
            assert consumer.all() == []

    # --- queues that come and go

    def test_queues_are_added_and_left_or_this_is_refused(
        self, publisher: Publisher, consumer: TappedConsumer, settings: Settings
    ) -> None:
        publisher.publish([message("more", "more")])
        more = Topology(settings).spec("more")
        if not self.changes_queues:
            assert consumer.consumer.queue_specs == ()
            for change in (consumer.consumer.add_queue(more), consumer.consumer.cancel_queue("celery")):
                with pytest.raises(SettingsError, match=r"cannot be .* while running"):
                    consumer.run(change)
            return
        consumer.run(consumer.consumer.add_queue(more))
        assert consumer.bodies(1) == ["more"]
        assert [spec.name for spec in consumer.consumer.queue_specs] == ["celery", "more"]
        consumer.run(consumer.consumer.cancel_queue("celery"))
        publisher.publish([message("left"), message("still", "more")])
        assert bodies(consumer.all()) == ["more", "still"]
        assert [spec.name for spec in consumer.consumer.queue_specs] == ["more"]

    def test_whether_it_saves_results_is_known(self, consumer: TappedConsumer) -> None:
        assert consumer.consumer.saves_results == isinstance(self, SavingConsumerConformance)


class SavingConsumerConformance(ConsumerConformance):
    """Of those that save results too, in one transaction with the verdicts (``saves_results``)."""

    @pytest.fixture
    def store(self, url: str, settings: Settings) -> Iterator[ResultStore]:
        store = open_store(url, settings)
        yield store
        store.close()

    def test_results_are_stored(self, consumer: TappedConsumer, store: ResultStore) -> None:
        ids = [new_id() for _ in range(3)]
        consumer.save(None, *((task_id, "SUCCESS", meta_of(task_id, result=n)) for n, task_id in enumerate(ids)))
        assert [store.wait(task_id, TIMEOUT_S)["result"] for task_id in ids] == [0, 1, 2]

    def test_a_result_that_is_waited_for_is_confirmed(
        self, publisher: Publisher, consumer: TappedConsumer, store: ResultStore
    ) -> None:
        publisher.publish([message(1)])
        (owner,) = consumer.arrived(1)
        task_id = new_id()
        consumer.save(owner, (task_id, "SUCCESS", meta_of(task_id)))
        assert consumer.fate(owner) == [True]
        assert store.load(task_id) is not None

    def test_a_consumer_without_queues_saves_results(self, url: str, settings: Settings, store: ResultStore) -> None:
        task_id = new_id()
        with TappedConsumer(url, settings, queues=()) as consumer:
            consumer.save(None, (task_id, "SUCCESS", meta_of(task_id)))
            assert store.wait(task_id, TIMEOUT_S)["status"] == "SUCCESS"


class ServerConsumerConformance(ConsumerConformance):
    """Of brokers that are servers: connections are lost, and servers are away."""

    @pytest.fixture
    def proxy(self, url: str) -> Iterator[FaultProxy]:
        parts = urlsplit(url)
        with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
            yield proxy

    @pytest.fixture
    def distant(self, url: str, settings: Settings, proxy: FaultProxy) -> Iterator[TappedConsumer]:
        consumer = TappedConsumer(proxy.url(url), settings)
        yield consumer
        proxy.resume()
        consumer.close()

    def test_a_lost_connection_is_told_and_what_it_held_comes_again(
        self,
        url: str,
        settings: Settings,
        publisher: Publisher,
        proxy: FaultProxy,
        distant: TappedConsumer,
    ) -> None:
        publisher.publish([message(1)])
        distant.arrived(1)
        proxy.cut()
        assert isinstance(distant.lost(), ConnectionLost)
        distant.close()
        with TappedConsumer(proxy.url(url), settings) as again:
            (each,) = again.arrived(1, 20.0)
            assert (each.body, each.deliveries) == (b"1", 2)

    def test_what_was_not_confirmed_is_there_to_be_sent_again(
        self, publisher: Publisher, proxy: FaultProxy, distant: TappedConsumer
    ) -> None:
        publisher.declare("next")
        publisher.publish([message(1)])
        (owner,) = distant.arrived(1)
        distant.publish(owner, message("known", "next"))
        assert distant.fate(owner) == [True]
        proxy.stall()
        sent = message("lost", "next")
        distant.publish(owner, sent)
        proxy.cut()
        distant.lost()
        outlet: Any = distant.consumer.outlet
        assert [(each.id, who is owner.delivery) for each, who in distant.call(outlet.take_unconfirmed)] == [
            (sent.id, True)
        ]

    def test_a_server_that_is_away_is_worth_another_try(self, url: str, settings: Settings) -> None:
        away = url.replace(f":{urlsplit(url).port}", f":{free_ports(1)}")
        with pytest.raises(ConnectionLost):
            TappedConsumer(away, settings)
