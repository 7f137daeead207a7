"""The publisher that tasks have, in a child of a real worker, and the suite that every publisher passes."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastq import FastQ, errors
from fastq.interfaces import Publisher
from fastq.running.pipes import PipePublisher
from fastq.settings import Settings
from fastq.testing import worker
from fastq.wire.message import Message
from tests.support.conformance.publishers import PublisherConformance


class PublisherInTask:
    """Does everything in a task. What it is asked goes by a file: messages may be larger than the worker takes."""

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._app = FastQ("in_task", broker=url, backend=url, task_default_queue="own", **settings)
        self._use = self._app.task(name="use")(self._in_task)
        self._stack.callback(self._app.close)
        self._stack.enter_context(worker(self._app, queues=["own"], pool="prefork"))

    def _in_task(self, name: str) -> Any:
        method, arguments = pickle.loads((self._folder / name).read_bytes())
        publisher = self._app.publisher
        if method == "publish":
            arguments = ([Message(*fields) for fields in arguments],)
        assert type(publisher) is PipePublisher
        try:
            return getattr(publisher, method)(*arguments), "", None
        except errors.PublishError as error:
            return None, str(error), error.again

    def _ask(self, method: str, *arguments: Any) -> Any:
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            file.write(pickle.dumps((method, arguments)))
        value, problem, again = self._use.delay(Path(file.name).name).get(10)
        if problem:
            raise errors.PublishError(problem, again=None if again is None else tuple(again))
        return value

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        self._ask("publish", *(
            (each.exchange, each.routing_key, each.props, each.body, each.id, each.priority, each.due, each.expires)
            for each in messages
        ))  # fmt: skip

    def declare(self, queue: str, deadline: float | None = None) -> None:
        self._ask("declare", queue)

    def purge(self, queue: str) -> int:
        return int(self._ask("purge", queue))

    def depth(self, queue: str) -> int:
        return int(self._ask("depth", queue))

    def close(self) -> None:
        self._ask("close")

    def end(self) -> None:
        """End the worker."""
        self._stack.close()


class TestPublisherOfTasks(PublisherConformance):
    looks_into_queues = False

    @pytest.fixture
    def url(self, sqlite_url: str) -> str:
        return sqlite_url

    @pytest.fixture
    def settings(self) -> Settings:
        return Settings()

    @pytest.fixture
    def made(self) -> Any:
        made: list[PublisherInTask] = []
        yield made
        for each in made:
            each.end()

    @pytest.fixture
    def publisher(self, url: str, made: list[PublisherInTask]) -> Publisher:  # type: ignore[override]
        return self.opened(url, {})

    @pytest.fixture(autouse=True)
    def keep(self, made: list[PublisherInTask]) -> None:
        self._made = made

    def stored(self, publisher: Publisher) -> None:
        """A call's result may come before its messages are stored; that of a later call does not."""
        publisher.close()

    def opened(self, url: str, settings: dict[str, Any]) -> Publisher:
        self._made.append(PublisherInTask(url, settings))
        return self._made[-1]
