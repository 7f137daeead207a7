"""What memory:// URLs name: messages and results in this process, shared by everybody who uses the same name.

No threads of its own except one for callbacks, and nothing outlives the process. For tests and examples.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastq.brokers.turns import due_of
from fastq.errors import SettingsError
from fastq.net import forks
from fastq.states import READY_STATES

if TYPE_CHECKING:
    from fastq.wire.message import Message


@dataclass(slots=True)
class Held:
    """A message and what became of it so far."""

    id: int
    queue: str
    priority: int
    props: bytes
    body: bytes
    deliveries: int = 0
    owner: object = None


class Space:
    """One named broker and result store. Thread-safe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead: list[tuple[Held, str]] = []
        self._is_inherited = False
        self._ids = itertools.count(1)
        self._start_over()
        forks.register(self)

    def _start_over(self) -> None:
        self._lock = threading.RLock()
        self._ready: dict[str, list[tuple[int, int, Held]]] = {}
        self._delayed: list[tuple[float, int, Held]] = []
        self._claimed: dict[int, Held] = {}
        self._listeners: list[Callable[[], None]] = []
        self._results: OrderedDict[str, tuple[str, bytes, float]] = OrderedDict()
        self._waiting: dict[str, list[Callable[[bytes], None]]] = {}
        self._observing: dict[str, list[Callable[[bytes], None]]] = {}
        self._callbacks: queue.SimpleQueue[Callable[[], None]] | None = None

    # --- messages -----------------------------------------------------------------------------------------------------

    def publish(self, messages: Iterable[Message]) -> None:
        """Store messages and wake the workers."""
        self._check_process()
        with self._lock:
            for message in messages:
                held = Held(next(self._ids), message.routing_key, message.priority, message.props, message.body)
                if message.due is None:
                    self._make_ready(held)
                else:
                    heapq.heappush(self._delayed, (due_of(message), held.id, held))
        self._notify()

    def declare(self, name: str) -> None:
        """Create a queue if it is missing."""
        self._check_process()
        with self._lock:
            self._ready.setdefault(name, [])

    def purge(self, name: str) -> int:
        """Drop the messages that wait in a queue and return how many there were."""
        with self._lock:
            count = self.depth(name)
            self._ready[name] = []
            self._delayed = [entry for entry in self._delayed if entry[2].queue != name]
            heapq.heapify(self._delayed)
        return count

    def depth(self, name: str) -> int:
        """Return how many messages wait in a queue, delayed ones too."""
        self._check_process()
        with self._lock:
            return len(self._ready.get(name, ())) + sum(held.queue == name for _, _, held in self._delayed)

    def claim(self, owner: object, queues: Sequence[str], limit: int) -> list[Held]:
        """Take up to ``limit`` messages: the same share of each queue that has any, by priority, then oldest first."""
        taken: list[Held] = []
        with self._lock:
            while self._delayed and self._delayed[0][0] <= time.time():
                self._make_ready(heapq.heappop(self._delayed)[2])
            waiting = [heap for name in queues if (heap := self._ready.get(name))]
            while waiting and len(taken) < limit:
                share = -(-(limit - len(taken)) // len(waiting))
                for heap in waiting:
                    count = min(share, len(heap), limit - len(taken))
                    taken += [heapq.heappop(heap)[2] for _ in range(count)]
                waiting = [heap for heap in waiting if heap]
            for held in taken:
                held.owner = owner
                held.deliveries += 1
                self._claimed[held.id] = held
        return taken

    def next_due(self) -> float | None:
        """Return when the next delayed message is due (unix time)."""
        with self._lock:
            return self._delayed[0][0] if self._delayed else None

    def delete(self, tags: Iterable[int]) -> None:
        """Delete claimed messages."""
        with self._lock:
            for tag in tags:
                self._claimed.pop(tag, None)

    def bury(self, tags: Iterable[int], reason: str) -> None:
        """Move claimed messages to the dead letters."""
        with self._lock:
            self.dead += [(held, reason) for tag in tags if (held := self._claimed.pop(tag, None))]

    def give_back(self, tags: Iterable[int], uncounted: int = 0) -> None:
        """Put claimed messages back to their old places. ``uncounted``: this many of their deliveries do not count."""
        with self._lock:
            for tag in tags:
                held = self._claimed.pop(tag, None)
                if held is not None:
                    held.deliveries -= uncounted
                    self._make_ready(held)
        self._notify()

    def give_back_all(self, owner: object) -> None:
        """Put back what an owner has claimed."""
        with self._lock:
            self.give_back([tag for tag, held in self._claimed.items() if held.owner is owner])

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function, from any thread, whenever messages have become ready."""
        with self._lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Call it no longer."""
        with self._lock:
            self._listeners.remove(listener)

    def _make_ready(self, held: Held) -> None:
        heapq.heappush(self._ready.setdefault(held.queue, []), (-held.priority, held.id, held))

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    # --- results ------------------------------------------------------------------------------------------------------

    def save(self, task_id: str, state: str, meta: bytes, expires_s: float | None) -> None:
        """Store a result, drop the expired ones, and tell who waits."""
        self._check_process()
        now = time.time()
        with self._lock:
            self._results[task_id] = (state, meta, now)
            self._results.move_to_end(task_id)
            while expires_s is not None and next(iter(self._results.values()))[2] < now - expires_s:
                self._results.popitem(last=False)
            waiting = self._waiting.pop(task_id, []) if state in READY_STATES else []
            waiting = [*waiting, *self._observing.get(task_id, ())]
        for callback in waiting:
            callback(meta)

    def load(self, task_id: str) -> bytes | None:
        """Return the stored meta."""
        self._check_process()
        with self._lock:
            found = self._results.get(task_id)
        return None if found is None else found[1]

    def forget(self, task_id: str) -> None:
        """Drop what is stored of a task."""
        self._check_process()
        with self._lock:
            self._results.pop(task_id, None)

    def when_ready(self, task_id: str, callback: Callable[[bytes], None]) -> bytes | None:
        """Return the final meta when there is one already; else call back, from the thread that saves it."""
        self._check_process()
        with self._lock:
            found = self._results.get(task_id)
            if found is not None and found[0] in READY_STATES:
                return found[1]
            self._waiting.setdefault(task_id, []).append(callback)
        return None

    def not_waiting(self, task_id: str, callback: Callable[[bytes], None]) -> None:
        """Do not call back."""
        with self._lock:
            waiting = self._waiting.get(task_id, [])
            if callback in waiting:
                waiting.remove(callback)
            if not waiting:
                self._waiting.pop(task_id, None)

    def observe(self, task_id: str, callback: Callable[[bytes], None]) -> bytes | None:
        """Return the meta that is there, and call back for each that is stored from now on, from the saving thread."""
        self._check_process()
        with self._lock:
            self._observing.setdefault(task_id, []).append(callback)
            found = self._results.get(task_id)
        return None if found is None else found[1]

    def not_observing(self, task_id: str, callback: Callable[[bytes], None]) -> None:
        """Do not call back any more."""
        with self._lock:
            observing = self._observing.get(task_id, [])
            if callback in observing:
                observing.remove(callback)
            if not observing:
                self._observing.pop(task_id, None)

    def in_background(self, callback: Callable[[], None]) -> None:
        """Run a function in the background thread."""
        with self._lock:
            if self._callbacks is None:
                self._callbacks = queue.SimpleQueue()
                thread = threading.Thread(
                    target=_run_all, args=(self._callbacks,), name="fastq-memory-results", daemon=True
                )
                thread.start()
            self._callbacks.put(callback)

    # --- one process --------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self._is_inherited:
            raise SettingsError(
                f"memory://{self.name} belongs to the process that forked this one; nothing gets there from here. "
                "Use sqlite:///fastq.db between processes"
            )

    def after_fork(self) -> None:
        """In a forked child: have nothing and refuse everything."""
        self._start_over()
        self._is_inherited = True


def _run_all(callbacks: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        callbacks.get()()


_spaces: dict[str, Space] = {}


def find_space(url: str) -> Space:
    """Return the space that a URL names: memory://, memory://name."""
    name = url.partition("://")[2].strip("/")
    # No lock, which a fork could leave held: of two threads that make one at once, both get the first.
    return _spaces.get(name) or _spaces.setdefault(name, Space(name))
