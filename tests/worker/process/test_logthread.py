"""Users' logging handlers are called in a thread of their own, in order, and nothing is lost at the end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import pytest

from fastq.worker.process.logthread import Forwarder, LogThread

TIMEOUT_S = 10.0


class Own(logging.Handler):
    """A handler of users': keeps messages; runs an event loop, waits for the gate, or logs by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.logs_itself = False

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.wait(TIMEOUT_S)
        asyncio.run(asyncio.sleep(0))
        self.messages.append(record.getMessage())
        if self.logs_itself:
            self.logs_itself = False
            logging.getLogger(record.name).warning("from the handler")


@pytest.fixture
def own() -> Iterator[Own]:
    logger = logging.getLogger("tests.logthread")
    handler = Own()
    logger.addHandler(handler)
    yield handler
    logger.handlers.clear()


def test_a_handler_of_users_is_called_in_order_beside_a_running_loop(own: Own) -> None:
    thread, logger = LogThread(), logging.getLogger("tests.logthread")
    own.logs_itself = True

    async def log() -> None:
        for number in range(100):
            logger.warning("%d", number)

    thread.take_over()
    asyncio.run(log())
    thread.close()
    assert own.messages == ["0", "from the handler", *map(str, range(1, 100))]
    assert logger.handlers == [own]


def test_a_handler_that_blocks_holds_nobody_up(own: Own) -> None:
    thread, logger = LogThread(), logging.getLogger("tests.logthread")
    thread.take_over()
    own.gate.clear()
    logger.warning("waits")
    logger.warning("waits too")
    assert own.messages == []
    own.gate.set()
    thread.close()
    assert own.messages == ["waits", "waits too"]


def test_what_only_writes_to_a_stream_stays_where_it_is(own: Own) -> None:
    thread, logger = LogThread(), logging.getLogger("tests.logthread")
    plain, json, filtered = (logging.StreamHandler() for _ in range(3))
    json.setFormatter(type("Json", (logging.Formatter,), {"__module__": "somebody.s"})())
    filtered.addFilter(lambda record: True)
    for each in (plain, json, filtered):
        logger.addHandler(each)
    thread.take_over()
    first, second = logger.handlers
    assert first is plain
    assert isinstance(second, Forwarder)
    assert second.handlers == [own, json, filtered]
    late = Own()
    logger.addHandler(late)
    thread.take_over()
    logger.warning("to the late one")
    thread.close()
    assert late.messages == ["to the late one"]
    assert {*logger.handlers} == {plain, own, json, filtered, late}
