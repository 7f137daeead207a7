from collections.abc import Callable

from fastq.wire.call import Call
from fastq.wire.message import Message

OUTCOME_SUCCESS: int
OUTCOME_FAILURE: int
OUTCOME_RETRY: int
OUTCOME_IGNORED: int
OUTCOME_REJECTED: int
OUTCOME_REQUEUE: int
OUTCOME_MALFORMED: int
OUTCOME_RETURNED: int
OUTCOME_UNKNOWN: int
FLAG_RECYCLE: int
FLAG_FOR_HOOKS: int
OUTCOME_NAMES: tuple[str, ...]
SHARED_SIZE: int

def shared_size(slots: int = 1) -> int: ...

class RingReader:
    def __init__(self, fd: int, slots: int = 1) -> None: ...
    def take(self) -> bytes | None: ...
    def stacks(self) -> str: ...
    @property
    def started(self) -> tuple[int, int]: ...

class ChildPipe:
    stopped: bool
    closed: bool
    slots: int
    on_slot: Callable[[int], None] | None
    on_cancel: Callable[[int, int], None] | None
    owner: Callable[[], Call | None] | None
    def __init__(self, sock: int, shared_fd: int, slots: int = 1) -> None: ...
    def next(self) -> Call | None: ...
    def take(self, waits: bool = False) -> list[Call]: ...
    def turn(self) -> None: ...
    def flush(self) -> None: ...
    @property
    def is_terminated(self) -> bool: ...
    def finish(
        self, call: Call, state: int, meta: bytes | None = None, reason: str | None = None, flags: int = 0
    ) -> None: ...
    def cancelled(self, call: Call) -> None: ...
    def fileno(self) -> int: ...
    def has_answered(self, call: Call) -> bool: ...
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
