from collections.abc import Callable

from fastq.wire.message import Call, Message

OUTCOME_NAMES: tuple[str, ...]
SHARED_SIZE: int

class RingReader:
    def __init__(self, fd: int) -> None: ...
    def take(self) -> bytes | None: ...
    def stacks(self) -> str: ...
    @property
    def started(self) -> tuple[int, int]: ...

class ChildPipe:
    stopped: bool
    on_slot: Callable[[int], None] | None
    def __init__(self, sock: int, shared_fd: int) -> None: ...
    def next(self) -> Call | None: ...
    @property
    def is_terminated(self) -> bool: ...
    def finish(
        self, call: Call, state: int, meta: bytes | None = None, reason: str | None = None, flags: int = 0
    ) -> None: ...
    def publish(self, message: Message) -> None: ...
    def state(self, task_id: str, state: str, meta: bytes) -> None: ...
    def ready(self) -> None: ...

def call_record(
    seq: int,
    exchange: str,
    routing_key: str,
    props: bytes,
    body: bytes,
    *,
    time_limit: float = 0,
    soft_time_limit: float = 0,
    wants_result: bool = False,
    redelivered: bool = False,
    deliveries: int = 1,
) -> bytes: ...
