# cython: language_level=3
"""What is here and in which state, and how others see it. Decides nothing: that is the message loop's, which derives from it."""

from fastq._child cimport Child, TaskRules, delivery_id, delivery_task
from fastq.link cimport DISPATCHED, FINISHED, LEDGER_STATES, STARTED, Source
from fastq.wire.dates cimport read_clock

from fastq.wire.pipe import OUTCOME_NAMES


cdef class Ledger(Keeper):
    def __init__(self, list tasks, int groups=1):
        self.tasks = {task.name.encode(): task for task in tasks}
        self.children = []
        self.sources = []
        self.lines = [WaitingLine() for _ in range(groups)]
        self.later = Later()
        self.handed = set()
        self.ledger = [0] * LEDGER_STATES
        self.outcomes = [0] * len(OUTCOME_NAMES)
        self.refused = {}

    cdef int move(self, Delivery delivery, int state) except -1:
        self.ledger[delivery.state] -= 1
        self.ledger[state] += 1
        delivery.state = state
        return 0

    cdef Py_ssize_t unsettled(self) except -1:
        return <Py_ssize_t> self.ledger[DISPATCHED] + <Py_ssize_t> self.ledger[STARTED] + <Py_ssize_t> self.ledger[FINISHED] \
            + self.in_line()

    cdef WaitingLine line_of(self, Delivery delivery):
        """The line that a delivery waits in, for a child of its task's group."""
        return <WaitingLine> self.lines[(<TaskRules> delivery.options).group]

    cdef Py_ssize_t in_line(self) except -1:
        cdef Py_ssize_t count = 0
        for line in self.lines:
            count += (<WaitingLine> line).count
        return count

    @property
    def waiting(self) -> int:
        """How many deliveries wait for a child."""
        return self.in_line()

    @property
    def load(self) -> int:
        """How many calls run or wait for a child of the first group."""
        cdef Py_ssize_t beside = self.outstanding_beside() if len(self.lines) > 1 else 0
        return self.in_line() + self.ledger[DISPATCHED] + self.ledger[STARTED] - beside

    def outstanding_beside(self) -> int:
        """Return how many calls children of other groups than the first one have, or wait for such."""
        cdef Py_ssize_t count = self.in_line() - (<WaitingLine> self.lines[0]).count
        for child in self.children:
            if (<Child> child).group:
                count += (<Child> child).outstanding()
        return count

    @property
    def running(self) -> int:
        """How many calls run."""
        return self.ledger[STARTED]

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits to run or waits for a confirmation."""
        return self.unsettled() == 0

    @property
    def only_stores(self) -> bool:
        """Whether nothing is to run any more, and what is left only waits to be stored."""
        return self.unsettled() == self.ledger[FINISHED]

    @property
    def prefetch(self) -> int:
        """How many messages may be here, ETA tasks not counted; 0: any number."""
        return sum([(<Source> source).window for source in self.sources])

    @property
    def scheduled_count(self) -> int:
        """How many were made to wait for their time or turn so far."""
        return self.later.order

    def scheduled_since(self, uint64_t count) -> int:
        """How many of those still wait that were made to since ``scheduled_count`` was that."""
        return self.later.since(count)

    def active(self) -> list[dict[str, object]]:
        """Return the running calls."""
        return [self.describe(call, child.pid, ran) for child in self.children for call, ran in child.calls if ran >= 0]

    def reserved(self) -> list[dict[str, object]]:
        """Return what is here and waits for a child, its time not counted."""
        cdef list found = [self.describe(call, None, -1.0) for child in self.children for call, ran in child.calls if ran < 0]
        return found + [self.describe(each, None, -1.0) for line in self.lines for each in (<WaitingLine> line).all()]

    def scheduled(self) -> list[dict[str, object]]:
        """Return what waits for its time or for its turn under a rate limit."""
        return [self.describe(delivery, None, -1.0) | {"eta": due} for due, _, delivery in self.later.entries()]

    def describe(self, Delivery delivery, object pid, double ran) -> dict[str, object]:
        """Return a delivery as inspection shows it; ``ran``: seconds since its start, -1 when it has not started."""
        return {
            "id": delivery_id(delivery), "name": delivery_task(delivery), "pid": pid,
            "started": read_clock() - ran if ran >= 0 else None, **delivery.describe(),
        }

    def stats(self) -> dict[str, object]:
        """Return the counters: deliveries by ledger state, outcomes, refusals by class."""
        return {
            "received": self.received, "done": self.done, "postponed": self.postponed, "waiting": self.in_line(),
            "scheduled": len(self.later) + self.parked,
            "ledger": dict(zip(("received", "dispatched", "started", "finished", "settled"), self.ledger)),
            "outcomes": dict(zip(("success", "failure", "retry", "ignored", "rejected", "requeued", "malformed", "returned",
                                  "unknown"), self.outcomes)),
            "refused": dict(self.refused),
        }
