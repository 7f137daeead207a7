"""A child that runs the tasks of a FastQ application: what is such an application's in its life."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import cast

from fastq.app import FastQ
from fastq.brokers import open_publisher
from fastq.results import open_store
from fastq.running.birth import ChildOptions
from fastq.running.child import ChildProcess
from fastq.running.pipes import Once, PipePublisher, PipeStore, ThreadPublisher, ThreadStore
from fastq.running.runner import Runner
from fastq.wire.pipe import ChildPipe


class FastQChild(ChildProcess):
    """A child that runs the tasks of a FastQ application."""

    def __init__(self, app: FastQ, options: ChildOptions) -> None:
        super().__init__(options, Runner(app, options))
        self._app = app

    def begin(self, pipe: ChildPipe, number: int) -> None:
        """Have what tasks send and store go through the pipe."""
        super().begin(pipe, number)
        app = self._app
        app.publisher = PipePublisher(pipe, app.conf.fastq_max_message_bytes)
        if app.stores_results:
            app.store = PipeStore(pipe, lambda: open_store(app.conf.result_backend or "", app.conf))

    def serve(self, pipe: ChildPipe) -> None:
        """Run calls until the pipe ends, inside of the application's lifespan; a loop enters it itself."""
        app = self._app
        span = None if app.lifespan is None or self._options.calls == "loop" else app.lifespan(app)
        if isinstance(span, AbstractContextManager):
            with span as app.state:
                super().serve(pipe)
        elif isinstance(span, AbstractAsyncContextManager) and self._options.awaits:
            from fastq.awaiting import entered_here  # an event loop, which few need here

            with entered_here(span) as app.state:
                super().serve(pipe)
        else:
            super().serve(pipe)

    def attach_here(self, pipe: ChildPipe) -> Callable[[], None]:
        """Have what tasks of this thread send and store go through the pipe, and all else by connections of its own."""
        app, sender = self._app, self._app.sender
        conf = app.conf
        publisher, store = sender.opened
        own = Once(lambda: open_publisher(cast("str", conf.broker_url), conf), publisher)
        own_store = Once(lambda: open_store(conf.result_backend or "", conf), store)
        app.publisher = ThreadPublisher(PipePublisher(pipe, conf.fastq_max_message_bytes), own)
        if app.stores_results:
            app.store = ThreadStore(pipe, own_store)

        def detach() -> None:
            app.publisher, app.store = own.value, own_store.value

        return detach
