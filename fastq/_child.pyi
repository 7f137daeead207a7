import asyncio

from fastq.link import Sink
from fastq.wire.pipe import RingReader

class Keeper(Sink): ...

class TaskRules:
    name: str
    acks_late: bool
    ignore_result: bool
    requeue_lost: bool
    reject_failed: bool
    handed_over: bool
    handed_in_turn: bool
    time_limit: float
    soft_time_limit: float
    rate_limit: float
    group: int
    run_ns: float
    runs: int
    def __init__(
        self,
        name: str,
        *,
        acks_late: bool = True,
        ignore_result: bool = False,
        requeue_lost: bool = True,
        reject_failed: bool = False,
        handed_over: bool = False,
        handed_in_turn: bool = False,
        time_limit: float = 0,
        soft_time_limit: float = 0,
        rate_limit: float = 0,
        group: int = 0,
    ) -> None: ...

class Child(asyncio.BufferedProtocol):
    slot: int
    pid: int
    accepting: bool
    limited: bool
    retiring: bool
    gone: bool
    killed_for: float
    terminated_by: int
    slots: int
    group: int
    def __init__(self, keeper: Keeper, slot: int, pid: int, reader: RingReader, *, group: int = 0) -> None: ...
    def activate(self, slot: int) -> None: ...
    def retire(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def kill_for(self, limit: float) -> None: ...
    @property
    def busy(self) -> int: ...
    @property
    def running_tasks(self) -> list[tuple[str, str, float]]: ...

class ManyChild(Child):
    def __init__(
        self,
        keeper: Keeper,
        slot: int,
        pid: int,
        reader: RingReader,
        *,
        slots: int,
        group: int = 0,
        gives_up: bool = False,
        stall_s: float = 0,
    ) -> None: ...
