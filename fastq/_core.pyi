import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from fastq.link import BatchSource, Sink, Source
from fastq.wire.pipe import RingReader

class CoreHooks(Protocol):
    def received(self, name: str, task_id: str) -> None: ...
    def refused(self, reason: str, queue: bytes, props: bytes, body: bytes) -> None: ...
    def failure(self, kind: str, name: str, task_id: str, detail: Any) -> tuple[str, bytes | None]: ...
    def unconfirmed(self, name: str, task_id: str) -> None: ...
    def child_ready(self, child: Child) -> None: ...
    def child_full(self, child: Child) -> None: ...
    def child_drained(self, child: Child) -> None: ...
    def child_broken(self, child: Child, reason: str) -> None: ...
    def hard_limit(self, child: Child, name: str, task_id: str, limit: float) -> None: ...

class TaskOptions:
    name: str
    acks_late: bool
    ignore_result: bool
    requeue_lost: bool
    acks_on_failure: bool
    time_limit: float
    soft_time_limit: float
    run_ns: float
    runs: int
    def __init__(
        self,
        name: str,
        *,
        acks_late: bool = True,
        ignore_result: bool = False,
        requeue_lost: bool = True,
        acks_on_failure: bool = True,
        time_limit: float = 0,
        soft_time_limit: float = 0,
    ) -> None: ...

class Child(asyncio.BufferedProtocol):
    slot: int
    pid: int
    accepting: bool
    limited: bool
    retiring: bool
    gone: bool
    killed_for: float
    def __init__(self, core: Core, slot: int, pid: int, reader: RingReader) -> None: ...
    def activate(self) -> None: ...
    def retire(self) -> None: ...
    def stop(self) -> None: ...
    def kill_for(self, limit: float) -> None: ...
    @property
    def busy(self) -> int: ...
    @property
    def running_task(self) -> tuple[str, str, float] | None: ...

class Core(Sink):
    children: list[Child]
    waiting: int
    rpc_results: bool
    stopping: bool
    reliable: bool
    run_ns: float
    received: int
    done: int
    refused: dict[str, int]
    ledger: list[int]
    outcomes: list[int]
    log_received: bool
    on_idle: Callable[[], None] | None
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tasks: list[TaskOptions],
        hooks: CoreHooks,
        *,
        reliable: bool = True,
        max_deliveries: int = 20,
        max_child_deaths: int = 3,
        max_tasks_per_child: int = 0,
        time_limit: float = 0,
        soft_time_limit: float = 0,
        rpc_results: bool = False,
    ) -> None: ...
    def add_source(self, source: Source) -> None: ...
    def drop_source(self, source: Source) -> None: ...
    def set_outlet(self, outlet: Source | None) -> None: ...
    def set_store(self, store: BatchSource) -> None: ...
    def add_child(self, child: Child) -> None: ...
    def remove_child(self, child: Child, reason: str) -> None: ...
    def tick(self) -> None: ...
    def quiet(self) -> None: ...
    def give_back_running(self) -> None: ...
    @property
    def is_idle(self) -> bool: ...
    def stats(self) -> dict[str, Any]: ...
