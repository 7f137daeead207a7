"""A whole broker in one file: a list of messages in a folder, behind a lock. ``tests.toys.toy_broker:BROKER:///folder``."""

import fcntl
import math
import pickle
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

from fastq.brokers import Broker
from fastq.brokers.limits import check_sizes
from fastq.brokers.pulling import PullingConsumer
from fastq.brokers.turns import Outcome, Room, Turns, Work, due_of
from fastq.errors import ConnectionLost
from fastq.link import ACK, REJECT, REQUEUE, RETURN
from fastq.settings import Settings
from fastq.wire.message import Message


class Held:
    def __init__(self, message: Message) -> None:
        self.tag = uuid.uuid4().int >> 64
        self.queue, self.priority, self.due = message.routing_key, message.priority, due_of(message)
        self.props, self.body, self.deliveries, self.owner = message.props, message.body, 0, 0


@contextmanager
def opened(url: str) -> Iterator[list[Held]]:
    try:
        file = open(Path(url.partition("://")[2], "messages"), "a+b")  # noqa: SIM115
    except OSError as error:
        raise ConnectionLost(f"the folder of {url} cannot be used: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        held: list[Held] = pickle.loads(file.read() or pickle.dumps([]))
        yield held
        file.truncate(0)
        file.write(pickle.dumps(held))


def waiting(held: list[Held], queue: str, now: float = math.inf) -> list[Held]:
    found = [each for each in held if each.queue == queue and not each.owner and each.due <= now]
    return sorted(found, key=lambda each: -each.priority)


class ToyPublisher:
    def __init__(self, url: str, settings: Settings) -> None:
        self._url, self._max_message_bytes = url, settings.fastq_max_message_bytes

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        check_sizes(messages, self._max_message_bytes)
        with opened(self._url) as held:
            held += map(Held, messages)

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Queues need no making."""

    def purge(self, queue: str) -> int:
        with opened(self._url) as held:
            dropped = waiting(held, queue)
            held[:] = [each for each in held if each not in dropped]
        return len(dropped)

    def depth(self, queue: str) -> int:
        with opened(self._url) as held:
            return len(waiting(held, queue))

    def close(self) -> None:
        """There is nothing to close."""


class ToyTurns(Turns):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._me, self._queues = uuid.uuid4().int, ()

    def enter(self, name: str, queues: Sequence[str]) -> None:
        self._queues = queues

    def turn(self, work: Work, room: Room) -> Outcome:
        gone, uncounted = {*work.tags(ACK), *work.tags(REJECT)}, {*work.tags(RETURN)}
        back = {*work.tags(REQUEUE), *uncounted}
        rows = []
        with opened(self.place) as held:
            held += [Held(message) for _, message in work.messages]
            held[:] = [each for each in held if each.tag not in gone]
            for each in held:
                if each.tag in back:
                    each.owner, each.deliveries = 0, each.deliveries - (each.tag in uncounted)
            lines = [waiting(held, queue, time.time()) for queue in self._queues]
            for each in (each for one_of_each in zip_longest(*lines) for each in one_of_each if each):
                if room:
                    each.owner, each.deliveries = self._me, each.deliveries + 1
                    rows.append((each.tag, each.queue.encode(), each.props, each.body, each.deliveries))
                    room = room.after(rows[-1:])
        return Outcome(rows, stored=work.tokens(), next_look_s=0.05)

    def leave(self, work: Work) -> Outcome:
        outcome = self.turn(work, Room())
        with opened(self.place) as held:
            for each in held:
                each.owner = 0 if each.owner == self._me else each.owner
        return outcome


BROKER = Broker((), ToyPublisher, lambda url, settings, core: PullingConsumer(ToyTurns(url), settings))
