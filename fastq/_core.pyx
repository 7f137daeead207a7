# cython: language_level=3
"""The message loop: admit deliveries, hand them to children, collect outcomes, save results, settle. No I/O of its own.

Everything happens on the event loop's thread. Per message nothing leaves compiled code; Python is called once per batch, and
for what is rare: refusals, failures that are recorded here, a child that must be killed or replaced.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t
from libc.string cimport memcmp, memcpy

from fastq._child cimport MAX_ADVANCE, Child, ManyChild, TaskRules, delivery_id, delivery_task
from fastq._ledger cimport Ledger
from fastq._waiting cimport WaitingLine
from fastq.link cimport ACK, DISPATCHED, FINISHED, RECEIVED, REJECT, REQUEUE, RETURN, SETTLED, STARTED
from fastq.wire.head cimport FINE, NO_TASK, Head, is_utf8, read_text, scan_head
from fastq.wire.message cimport encode_result_properties
from fastq.wire.dates cimport read_clock
from fastq.wire.pipe cimport (
    FLAG_FOR_HOOKS, FLAG_RECYCLE, OUTCOME_FAILURE, OUTCOME_MALFORMED, OUTCOME_REJECTED, OUTCOME_REQUEUE,
    OUTCOME_RETURNED, OUTCOME_UNKNOWN, RECORD_OUTCOME, RECORD_PUBLISH, RECORD_READY, RECORD_STATE,
    OutcomeRecord, PublishRecord, StateRecord, load32, load64s, monotonic_ns, store32)

import os

from fastq.errors import EncodeError, LocalProtocolError
from fastq.states import READY_STATES
from fastq.wire.head import PROBLEMS

cdef enum:
    NO_LIMIT = 0xFFFFFFFF
    MAX_ADVANCE_BYTES = 1 << 20
    STATE_COUNT = 9

# A child is given calls in advance for as long as they will probably take less than this together: long enough to hide the
# hand-over (measured about 0.1 ms with both sides asleep), short enough that nothing waits noticeably behind them.
cdef double ADVANCE_NS = 2e6
# Calls go to a child that is awake for as long as they take this together: waking another costs more (measured 50 to 100 µs).
cdef double PACK_NS = 0.2e6
# And this much when as many children are awake as there are cores: one more would end nothing sooner.
cdef double CROWD_NS = 1e6
cdef int CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
cdef double STUCK_NS = 10e6     # after this a running call is long: what waits behind it is taken back
cdef double CANCEL_NS = 1e9     # a call that was told to end has as long for that
cdef double STALL_NS = 1e9      # a loop that takes no turn for longer is worth a line
cdef double TICK_S = 0.005      # acks and held outcomes wait at most this long
cdef double LIMIT_TICK_S = 0.05     # precision of hard time limits
cdef double FAR_S = 10.0        # what is due sooner is not worth a way through the broker
cdef double OVERTAKE_S = 0.002  # a retry that comes before the run that asked for it has ended is looked at again then
cdef double ETA_TICK_S = 1.0    # the wall clock is looked at again at least this often, so a jump delays nothing longer

_STATES = ("SUCCESS", "FAILURE", "RETRY", "IGNORED", "REJECTED", "REJECTED", "REJECTED", "RECEIVED", "FAILURE")


# --- the loop ---------------------------------------------------------------------------------------------------------

cdef class Core(Ledger):
    """The message loop of one worker.

    ``tasks`` are the TaskRules by name; ``are_many`` says for each group whether its children run several calls at a time.
    ``hooks`` (``interfaces.CallHooks``) and ``pool`` (``interfaces.ChildHooks``) are called for what is rare. Limits are in
    seconds, 0 = none.
    """

    def __init__(self, object loop, list tasks, object hooks, object pool, *, bint reliable=True, int max_deliveries=20,
                 int max_child_deaths=3, uint64_t max_tasks_per_child=0, double time_limit=0, double soft_time_limit=0,
                 double grace=0, bint rpc_results=False, tuple are_many=(False,)):
        super().__init__(tasks, len(are_many))
        self.are_many = list(are_many)
        self.loop = loop
        self.hooks = hooks
        self.pool = pool
        self.reliable = reliable
        self.max_deliveries = max_deliveries
        self.max_child_deaths = max_child_deaths
        self.max_tasks_per_child = max_tasks_per_child
        self.time_limit = time_limit
        self.soft_time_limit = soft_time_limit
        self.grace = grace
        self.rpc_results = rpc_results
        self.backlog = []
        self.own_task = TaskRules("", requeue_lost=reliable)
        self.run_ns = -1
        self.max_etas = 1000    # about a megabyte

    # --- parts

    def add_source(self, Source source) -> None:
        """Receive from this source."""
        source.bind(self)
        self.sources.append(source)
        source.flush(True)

    def drop_source(self, Source source) -> None:
        """The source's connection is gone: forget what it brought and has not started; the broker hands it out again."""
        cdef Delivery each
        source.dead = True
        if source in self.sources:
            self.sources.remove(source)
        for line in self.lines:
            for each in (<WaitingLine> line).drop(source):
                self.move(each, SETTLED)
        for each in self.later.drop(source):
            self.move(each, SETTLED)
        for each in [each for each in self.handed if (<Delivery> each).source is source]:
            self.handed.remove(each)
            self.move(each, SETTLED)
        for child in self.children:
            self.take_back(<Child> child)

    def set_outlet(self, Source outlet) -> None:
        """Publish follow-ups and replies through this connection (None: keep them until there is one)."""
        cdef Source old = self.outlet
        self.outlet = outlet
        if old is not None and old is not outlet and hasattr(old, "take_unconfirmed"):
            self.backlog = old.take_unconfirmed() + self.backlog
        if outlet is not None:
            outlet.bind(self)
            backlog, self.backlog = self.backlog, []
            for message, owner in backlog:
                if message is not None:
                    self.publish(<Message> message, <Delivery> owner)
            outlet.flush(True)

    def set_store(self, BatchSource store) -> None:
        """Save results there, those first that the store before has not confirmed."""
        cdef BatchSource old = self.store
        self.store = store
        store.bind(self)
        if old is None or old is store:
            return
        for owner, task_id, state, meta, reply_to in old.take_unsaved():
            store.keep_result(<Delivery> owner, task_id, state, meta, reply_to, True)
        store.flush(True)

    def lose_store(self) -> None:
        """The store's connection is gone: keep results, within bounds, for the next one."""
        self.store.bury()
        self.on_batch()

    def look_at_store(self) -> None:
        """See whether the store still takes what it is given; who waits for one that does not holds up nobody else."""
        cdef bint was_stuck = self.store.is_stuck
        self.store.look()
        if self.store.is_stuck and not was_stuck:
            self.on_batch()

    def add_child(self, Child child) -> None:
        """Watch over a child; it gets calls once ``activate`` was called."""
        self.children.append(child)

    def remove_child(self, Child child, str reason) -> None:
        """A child's process has ended: decide about everything it still held."""
        cdef Delivery delivery
        cdef uint32_t started
        cdef list unstarted = []
        self.collect(child)
        child.gone = True
        child.accepting = False
        if child in self.children:
            self.children.remove(child)
        started = child.killed_seq if child.killed_for or child.terminated_by else load32(&child.reader.shared.started)
        for delivery in child.held():
            if delivery.seq > started:
                unstarted.append(delivery)
            elif delivery.seq == started or child.slots > 1:
                self.lost(delivery, child, reason)
            else:
                unstarted.append(delivery)  # its answer made no sense
        for delivery in reversed(unstarted):
            self.release(delivery)
        child.sent = [None] * (child.mask + 1)
        child.first = child.next
        self.on_batch()

    cdef int release(self, Delivery delivery) except -1:
        """A call that did not start is to be run by another child, or goes back to its broker."""
        if delivery.state == SETTLED:
            return 0
        if delivery.source.dead and not delivery.settled:
            self.move(delivery, SETTLED)
        elif self.stopping and delivery.settled:
            self.fail(delivery, "lost", "the worker stops, and its process has ended before it had begun", ACK)
        elif self.stopping:
            self.settle(delivery, RETURN)
        else:
            self.move(delivery, RECEIVED)
            self.line_of(delivery).join_first(delivery)
        return 0

    cdef int lost(self, Delivery delivery, Child child, str reason) except -1:
        """The child died while it ran this call."""
        cdef TaskRules task = <TaskRules> delivery.options
        if delivery.state == SETTLED:
            return 0    # given back already, as the worker is stopping
        if child.slots > 1 and self.is_spared(delivery, <ManyChild> child):
            return 0
        if child.terminated_by and delivery.source.dead and not delivery.settled:
            # The broker gives it to somebody else, and who revoked it has told all workers.
            self.hooks.cancelled(delivery_task(delivery), delivery_id(delivery), delivery)
            return self.move(delivery, SETTLED)
        if child.terminated_by:
            return self.fail(delivery, "terminated", child.terminated_by, ACK)
        if child.killed_for:
            return self.fail(delivery, "time-limit", child.killed_for, ACK)
        reason = f"{reason} Job: {delivery.seq}"
        if delivery.settled or not task.requeue_lost:
            return self.fail(delivery, "lost", reason, ACK)
        delivery.deaths += 1
        if child.slots > 1 and not (<ManyChild> child).alone:
            # It may have been any of those that ran: before the last death it runs alone.
            delivery.deaths = min(delivery.deaths, self.last_death())
        elif delivery.deaths >= self.max_child_deaths:
            # It has killed every child it was given to: to the dead letters, before it takes the others' time.
            return self.fail(delivery, "lost", f"{reason} ({delivery.deaths} times; not run again)", REJECT)
        if self.stopping:
            return self.settle(delivery, REQUEUE)
        if delivery.source.dead:
            return self.move(delivery, SETTLED)
        delivery.deliveries += 1
        self.move(delivery, RECEIVED)
        return self.line_of(delivery).join_first(delivery)

    cdef int last_death(self) noexcept:
        """How many deaths a call may have seen and be run among others."""
        return max(1, self.max_child_deaths - 1)

    cdef bint is_spared(self, Delivery delivery, ManyChild child) except -1:
        """Decide about a call whose child died with others, if it did not die of this one."""
        cdef object cancelled = child.cancelled.pop(delivery.seq, None)
        if cancelled is not None:
            self.end_cancelled(delivery, cancelled[0], cancelled[1])
            return True
        if child.sacrificed and not child.is_stuck:
            self.release(delivery)
            return True
        return False

    cdef int end_cancelled(self, Delivery delivery, str kind, object detail) except -1:
        """A call that was told to end has ended, or its process has."""
        if kind == "terminated" and delivery.source.dead and not delivery.settled:
            self.hooks.cancelled(delivery_task(delivery), delivery_id(delivery), delivery)
            return self.move(delivery, SETTLED)
        return self.fail(delivery, kind, detail, ACK)

    # --- admit

    cdef int on_delivery(self, Delivery delivery) except -1:
        """Decide about a delivery: run it, keep it for its time, or refuse it. No content can raise here."""
        cdef int problem = scan_head(<const uint8_t *> PyBytes_AS_STRING(delivery.props), PyBytes_GET_SIZE(delivery.props),
                                     &delivery.head)
        cdef const char *name
        cdef Py_ssize_t size
        cdef TaskRules task = self.last_task
        delivery.state = RECEIVED
        self.ledger[RECEIVED] += 1
        if delivery.source.is_own:
            return self.on_own_call(delivery)
        self.received += 1
        if delivery.oversized:
            return self.refuse(delivery, "oversized", "")
        if problem == NO_TASK and self.reads_foreign and self.read_foreign(delivery):
            problem = scan_head(<const uint8_t *> PyBytes_AS_STRING(delivery.props), PyBytes_GET_SIZE(delivery.props),
                                &delivery.head)
        if delivery.head.reply_to.length and not is_utf8(
                <const uint8_t *> PyBytes_AS_STRING(delivery.props) + delivery.head.reply_to.offset, delivery.head.reply_to.length):
            # Nobody can be listening there.
            delivery.head.reply_to.length = 0
        if problem != FINE:
            return self.refuse(delivery, <str> PROBLEMS[problem], "")
        name = PyBytes_AS_STRING(delivery.props) + delivery.head.task.offset
        size = delivery.head.task.length
        if task is None or PyBytes_GET_SIZE(task.key) != size or memcmp(PyBytes_AS_STRING(task.key), name, size) != 0:
            task = <TaskRules> self.tasks.get(PyBytes_FromStringAndSize(name, size))
            if task is None:
                return self.fail(delivery, "unknown", delivery_task(delivery), REJECT)
            self.last_task = task
        delivery.options = task
        if delivery.head.delivery_count:
            delivery.deliveries = <int> delivery.head.delivery_count + 1
        if self.wants_received and self.hooks.received(task.name, delivery_id(delivery), delivery):
            self.handed.add(delivery)
            return 0
        return self.go_on(delivery)

    cdef int go_on(self, Delivery delivery) except -1:
        """Decide about the message of a known task that was announced to those who want to know."""
        cdef TaskRules task = <TaskRules> delivery.options
        if self.stopping:
            return self.settle(delivery, RETURN)
        if self.reliable and delivery.deliveries > self.max_deliveries:
            return self.fail(delivery, "deliveries", delivery.deliveries, REJECT)
        if task.handed_over:
            return self.hand(delivery)
        return self.admit(delivery)

    def proceed(self, Delivery delivery) -> None:
        """Go on with a delivery of which ``received`` has said True; no harm when it was given back meanwhile."""
        if delivery in self.handed:
            self.handed.remove(delivery)
            self.go_on(delivery)
            self.on_batch()

    cdef int on_own_call(self, Delivery delivery) except -1:
        """A call that the main process has made: it waits for nothing but a child."""
        delivery.options = self.tasks.get(delivery_task(delivery).encode(), self.own_task)
        if self.stopping:
            return self.settle(delivery, RETURN)
        return self.line_of(delivery).join(delivery)

    cdef int hand(self, Delivery delivery) except -1:
        """Give a delivery to the hooks, which say by ``judge`` what becomes of it."""
        self.handed.add(delivery)
        self.hooks.handed(delivery)
        return 0

    def judge(self, Delivery delivery, int verdict) -> None:
        """Settle a delivery that the hooks have; it is no harm when it was given back or forgotten meanwhile."""
        if delivery in self.handed:
            self.handed.remove(delivery)
            self.settle(delivery, verdict)
            self.on_batch()

    cdef int give_back_handed(self) except -1:
        handed, self.handed = self.handed, set()
        for each in handed:
            self.settle(<Delivery> each, RETURN)
        return 0

    cdef int admit(self, Delivery delivery) except -1:
        """Run a delivery, have it wait for its time or its turn, or end it because it must not run any more."""
        cdef double now, turn
        cdef TaskRules task = <TaskRules> delivery.options
        if delivery.head.expires and delivery.head.expires <= read_clock():
            return self.fail(delivery, "expired", delivery.head.expires, ACK)
        if self.revoked_ids is not None and self.is_revoked(delivery):
            return self.fail(delivery, "revoked", None, ACK)
        if delivery.head.eta and delivery.head.eta > read_clock():
            is_full = len(self.later) >= self.max_etas or delivery.source.held_bytes > delivery.source.most_for_later()
            if is_full and delivery.source.postpone is not None and self.postpone(delivery):
                return 0
            return self.later.put(delivery, delivery.head.eta)
        if delivery.head.retries > 0 and self.runs_already(delivery):
            return self.later.put(delivery, read_clock() + OVERTAKE_S)
        if task.rate_limit > 0 and not delivery.is_rated:
            now = read_clock()
            turn = self.turn_of(delivery, now)
            if turn > now:
                return self.later.put(delivery, turn)
        if task.handed_in_turn:
            return self.hand(delivery)
        return self.line_of(delivery).join(delivery)

    cdef bint runs_already(self, Delivery delivery) except -1:
        """Whether the run before this retry has not ended yet: what it still stores must not come last."""
        cdef Delivery other
        cdef const char *task_id = PyBytes_AS_STRING(delivery.props) + delivery.head.id.offset
        for each in self.children:
            for other in (<Child> each).running():
                if (other is not delivery and other.head.id.length == delivery.head.id.length
                        and memcmp(PyBytes_AS_STRING(other.props) + other.head.id.offset, task_id, other.head.id.length) == 0):
                    return True
        return False

    cdef double turn_of(self, Delivery delivery, double now) except -1:
        """Assign the delivery the next turn that the task's rate limit has, and return its time."""
        cdef TaskRules task = <TaskRules> delivery.options
        cdef double turn = task.next_turn if task.next_turn > now else now
        task.next_turn = turn + 1 / task.rate_limit
        delivery.is_rated = True
        return turn

    cdef bint postpone(self, Delivery delivery) except -1:
        """Have the broker keep a message until nearer its time; False when it is near, or cannot be kept there now."""
        if self.stopping or delivery.head.eta - read_clock() < FAR_S:
            return False
        message = delivery.source.postpone(delivery.describe() | {"id": delivery_id(delivery)}, delivery.head.eta)
        if message is None:
            return False
        self.postponed += 1
        self.move(delivery, FINISHED)
        delivery.verdict = ACK
        # Acknowledged once its copy is confirmed.
        delivery.pending += 1
        self.publish(<Message> message, delivery)
        return True

    def postpone_far(self) -> None:
        """The broker keeps messages from now on: give it what is far, beyond what is held here anyway."""
        cdef Delivery delivery
        cdef Py_ssize_t size, held = 0
        cdef list kept = []
        for entry in self.later.entries():
            delivery = <Delivery> (<tuple> entry)[2]
            size = PyBytes_GET_SIZE(delivery.props) + PyBytes_GET_SIZE(delivery.body)
            is_full = len(kept) >= self.max_etas or held + size > delivery.source.most_for_later()
            if not is_full or delivery.source.postpone is None or not self.postpone(delivery):
                kept.append(entry)
                held += size
        self.later.heap = kept      # sorted, which is a heap
        self.on_batch()

    cdef bint is_revoked(self, Delivery delivery) except -1:
        return delivery_id(delivery) in self.revoked_ids

    cdef bint read_foreign(self, Delivery delivery) except -1:
        """Put a message of an older form into today's; False when it is none."""
        found = self.hooks.foreign(delivery.props, delivery.body)
        if found is None:
            return False
        delivery.props, delivery.body = found
        return True

    cdef int refuse(self, Delivery delivery, str reason, str detail) except -1:
        """Reject a message that is not a task message; counted under its class. Who waits for it is told, if its id was read."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.hooks.refused(reason, delivery.routing_key, delivery.props, delivery.body)
        if delivery.head.id.length == 0:
            return self.settle(delivery, REJECT)
        return self.fail(delivery, "refused", (reason, detail), REJECT)

    cdef int fail(self, Delivery delivery, str kind, object detail, int verdict) except -1:
        """End a delivery that no child can end: record its failure, then settle it."""
        if kind == "unknown":
            delivery.reason = "unregistered"
        elif kind == "refused":
            delivery.reason = f"class={detail[0]}"
        elif kind == "deliveries":
            delivery.reason = f"delivered {detail} times"
        elif kind == "lost" and delivery.deaths:
            delivery.reason = f"killed {delivery.deaths} children: {detail}"
        else:
            delivery.reason = f"{kind}: {detail}"
        recorded = self.hooks.failure(kind, delivery_task(delivery), delivery_id(delivery), detail, delivery)
        if kind == "unknown" or kind == "deliveries":
            self.refused[kind] = self.refused.get(kind, 0) + 1
        self.move(delivery, FINISHED)
        delivery.verdict = verdict
        if recorded is None:
            # Somebody else records it, and says so by ``recorded``.
            delivery.pending += 1
            return 0
        state, meta = recorded
        if meta is not None and self.wants_result(delivery):
            self.save(delivery, state, meta, True)
        return self.conclude(delivery)

    def confirmed(self, Delivery delivery) -> None:
        """What the hooks were given of this delivery is done."""
        self.on_confirmed(delivery, True)
        self.on_batch()

    def recorded(self, Delivery delivery, int verdict, str reason=None) -> None:
        """The failure for which the hooks have returned None is recorded: settle the delivery, with this verdict.

        ``reason``: why it is rejected, where the message loop does not know.
        """
        delivery.verdict = verdict
        if reason is not None:
            delivery.reason = reason
        self.on_confirmed(delivery, True)
        self.on_batch()

    # --- dispatch

    cdef Child pick_among_many(self, Delivery delivery):
        """The child of several calls at a time to give the next call to: the one that has the fewest.

        None while those that are to end still run as many calls as those that take their places would.
        """
        cdef ManyChild child, best = None
        cdef TaskRules task = <TaskRules> delivery.options
        cdef bint alone = delivery.deaths >= self.last_death()
        cdef uint32_t running = 0, places = 0
        for each in self.children:
            if (<Child> each).group != task.group:
                continue
            child = <ManyChild> each
            running += child.outstanding()
            if not child.accepting:
                continue
            places += child.most
            if not child.limited and child.has_free_place() and (best is None or child.outstanding() < best.outstanding()):
                best = child
        if running >= places:
            return None
        return None if best is not None and alone and best.outstanding() else best

    cdef Child pick(self, TaskRules task):
        """The child to give the next call to: one that is awake with little to do, an idle one unless the cores are taken by
        others with short calls, or the least loaded one that may be given calls in advance."""
        cdef Child child, best = None, idle = None, awake = None
        cdef uint32_t load
        cdef double expected_ns
        cdef int awake_count = 0
        cdef int64_t now = monotonic_ns(), begun, since_ns
        for each in self.children:
            child = <Child> each
            if not child.accepting or child.limited or child.group != task.group:
                continue
            load = child.outstanding()
            if load == 0:
                if idle is None:
                    idle = child
                continue
            expected_ns = child.expected_ns + task.run_ns
            if (task.run_ns < 0 or expected_ns > ADVANCE_NS or load >= MAX_ADVANCE
                    or child.out.size > MAX_ADVANCE_BYTES):
                continue
            begun = load64s(&child.reader.shared.started_ns)
            since_ns = now - (child.woken_ns if child.woken_ns > begun else begun)
            if task.run_ns <= PACK_NS and expected_ns <= CROWD_NS and since_ns < CROWD_NS:
                if expected_ns <= PACK_NS and since_ns < PACK_NS:
                    return child
                awake_count += 1
                if awake is None or child.expected_ns < awake.expected_ns:
                    awake = child
            if best is None or load < best.outstanding():
                best = child
        if awake_count >= CORES:
            return awake
        return best if idle is None else idle

    cdef int dispatch(self) except -1:
        """Hand waiting deliveries to children for as long as one takes them."""
        for line in self.lines:
            self.dispatch_line(<WaitingLine> line)
        for each in self.children:
            (<Child> each).flush()
        return 0

    cdef int dispatch_line(self, WaitingLine line) except -1:
        cdef Delivery delivery
        cdef Child child
        while line.first is not None and not self.on_hold:
            delivery = line.first
            if self.are_many[(<TaskRules> delivery.options).group]:
                child = self.pick_among_many(delivery)
            else:
                child = self.pick(<TaskRules> delivery.options)
            if child is None:
                break
            line.leave()
            if delivery.head.expires and delivery.head.expires <= read_clock():
                self.fail(delivery, "expired", delivery.head.expires, ACK)
                continue
            if self.revoked_ids is not None and self.is_revoked(delivery):
                self.fail(delivery, "revoked", None, ACK)
                continue
            self.hand_over(child, delivery)
        return 0

    cdef int hand_over(self, Child child, Delivery delivery) except -1:
        cdef TaskRules task = <TaskRules> delivery.options
        cdef bint starts = child.has_free_place()
        child.write_call(delivery, self.wants_result(delivery), self.wants_outcomes, self.limit_of(delivery),
                         self.soft_limit_of(delivery))
        child.expected_ns += task.run_ns if task.run_ns > 0 else ADVANCE_NS
        self.move(delivery, DISPATCHED)
        if child.slots > 1:
            (<ManyChild> child).alone = delivery.deaths >= self.last_death()
            self.started(delivery, child.pid)
        elif starts:
            child.woken_ns = monotonic_ns()
            self.started(delivery, child.pid)
        if self.max_tasks_per_child and child.given >= self.max_tasks_per_child:
            child.retire()
            self.pool.child_full(child)
        return 0

    cdef bint wants_result(self, Delivery delivery) except -1:
        cdef bint ignored
        if delivery.source.is_own:
            return False
        if self.store is None and (not self.rpc_results or delivery.head.reply_to.length == 0 and not self.answers_all):
            return False
        ignored = False
        if delivery.options is not None:
            ignored = (<TaskRules> delivery.options).ignore_result
        if delivery.head.ignore_result >= 0:
            ignored = delivery.head.ignore_result
        return not ignored

    cdef double limit_of(self, Delivery delivery) except -1:
        # What the message says wins, 0 (no limit) included.
        if delivery.head.time_limit >= 0:
            return delivery.head.time_limit
        return (<TaskRules> delivery.options).time_limit or self.time_limit

    cdef double soft_limit_of(self, Delivery delivery) except -1:
        if delivery.head.soft_time_limit >= 0:
            return delivery.head.soft_time_limit
        return (<TaskRules> delivery.options).soft_time_limit or self.soft_time_limit

    cdef int started(self, Delivery delivery, int pid) except -1:
        """A child starts a call now. Early acknowledgement happens here."""
        self.move(delivery, STARTED)
        if delivery.source.is_own:
            self.hooks.accepted(delivery, pid)
            return 0
        if self.wants_outcomes:
            self.hooks.started(delivery_id(delivery), pid)
        if not (<TaskRules> delivery.options).acks_late and not delivery.settled:
            delivery.settled = True
            delivery.source.tell(delivery, ACK)
        return 0

    # --- collect

    cdef int on_bell(self, Child child) except -1:
        self.collect(child)
        return self.on_batch()

    cdef int collect(self, Child child) except -1:
        """Take every record a child has written. A child whose memory makes no sense is killed."""
        cdef Py_ssize_t size = 0
        cdef const uint8_t *record
        cdef uint8_t kind
        try:
            while True:
                record = child.reader.next(&size)
                if record == NULL:
                    return 0
                kind = record[4]
                if kind == RECORD_OUTCOME:
                    self.on_outcome(child, record, size)
                elif kind == RECORD_PUBLISH:
                    self.on_publish(child, record, size)
                elif kind == RECORD_STATE:
                    self.on_state(child, record, size)
                elif kind == RECORD_READY:
                    self.pool.child_ready(child)
                else:
                    raise LocalProtocolError(f"record of unknown kind {kind} from child {child.pid}")
                child.reader.consumed(size)
        except LocalProtocolError as error:
            child.retire()
            self.pool.child_broken(child, str(error))
        return 0

    cdef int on_outcome(self, Child child, const uint8_t *p, Py_ssize_t size) except -1:
        cdef OutcomeRecord record
        cdef Delivery delivery, next_one
        cdef TaskRules task
        cdef const char *payload = <const char *> p + sizeof(OutcomeRecord)
        cdef bytes meta = None
        cdef str reason = None
        if size < <Py_ssize_t> sizeof(OutcomeRecord):
            raise LocalProtocolError("outcome record is cut short")
        memcpy(&record, p, sizeof(OutcomeRecord))
        if child.answered:
            return 0    # the calls behind one whose time was up are decided with it
        if record.state >= STATE_COUNT:
            raise LocalProtocolError(f"child {child.pid} says of call {record.seq} that it ended in way {record.state}")
        if <Py_ssize_t> (sizeof(OutcomeRecord) + record.meta_size) > size:
            raise LocalProtocolError("outcome record is cut short")
        if (child.killed_for or child.terminated_by) and record.seq == child.killed_seq:
            # Its time was up. What it still says (the stack dump may have interrupted what it waited in) comes too late;
            # it is decided when the process has ended.
            child.answered = True
            return 0
        delivery = child.answer(record.seq)
        if record.flags & FLAG_RECYCLE and not child.retiring:
            child.retire()
            self.pool.child_full(child)
        if child.slots == 1 and child.outstanding():
            next_one = child.call_of(child.first)
            if next_one is not None:
                self.started(next_one, child.pid)
        elif child.outstanding() == 0:
            child.expected_ns = 0
            if child.retiring:
                self.pool.child_drained(child)
        if child.limited and (child.outstanding() == 0 or child.slots > 1 and not (<ManyChild> child).taken):
            child.limited = False
            store32(&child.reader.shared.limit, NO_LIMIT)
        if delivery is None:
            return 0
        task = <TaskRules> delivery.options
        child.expected_ns -= task.run_ns if task.run_ns > 0 else ADVANCE_NS
        if child.expected_ns < 0:
            child.expected_ns = 0
        if record.state == OUTCOME_RETURNED:
            return self.release(delivery)
        if child.slots > 1:
            cancelled = (<ManyChild> child).cancelled.pop(record.seq, None)
            if cancelled is not None:
                return self.end_cancelled(delivery, cancelled[0], cancelled[1])
        task.note_run(<double> record.runtime_ns)
        self.run_ns = record.runtime_ns if self.run_ns < 0 else self.run_ns + (record.runtime_ns - self.run_ns) * 0.05
        self.done += 1
        self.outcomes[record.state] += 1
        if record.meta_size:
            meta = PyBytes_FromStringAndSize(payload, record.meta_size)
        if size > <Py_ssize_t> (sizeof(OutcomeRecord) + record.meta_size):
            reason = PyUnicode_DecodeUTF8(payload + record.meta_size, size - sizeof(OutcomeRecord) - record.meta_size, b"replace")
        self.move(delivery, FINISHED)
        delivery.verdict = ACK
        if record.flags & FLAG_FOR_HOOKS:
            delivery.pending += 1
            self.hooks.reported(delivery, <str> _STATES[record.state], meta)
            return 0
        if record.state == OUTCOME_MALFORMED:
            reason, _, detail = reason.partition("\n")
            return self.refuse(delivery, reason, detail)
        if record.state == OUTCOME_UNKNOWN:
            delivery.verdict = REJECT
            delivery.reason = "unregistered"
        elif record.state == OUTCOME_REJECTED:
            delivery.verdict = REJECT
            # The child says first why, then what monitors are told.
            why, _, reason = (reason or "").partition("\n")
            delivery.reason = f"Reject: {why}"
        elif record.state == OUTCOME_REQUEUE:
            delivery.verdict = REQUEUE
        elif record.state == OUTCOME_FAILURE and task.reject_failed and task.acks_late:
            delivery.verdict = REJECT
        if self.wants_outcomes:
            self.hooks.finished(task.name, delivery_id(delivery), _STATES[record.state], reason, record.runtime_ns * 1e-9)
        if meta is not None:
            self.save(delivery, <str> _STATES[record.state], meta, True)
        return self.conclude(delivery)

    cdef int on_publish(self, Child child, const uint8_t *p, Py_ssize_t size) except -1:
        """A message that the running call sends; the call is not settled before it is confirmed."""
        cdef PublishRecord record
        cdef const char *text = <const char *> p + sizeof(PublishRecord)
        cdef bytes props, body
        cdef Delivery owner
        cdef Head head
        cdef str exchange, routing_key
        if size < <Py_ssize_t> sizeof(PublishRecord):
            raise LocalProtocolError("publish record is cut short")
        memcpy(&record, p, sizeof(PublishRecord))
        if <uint64_t> size != (sizeof(PublishRecord) + record.exchange_size + record.routing_key_size
                               + <uint64_t> record.props_size + record.body_size):
            raise LocalProtocolError("publish record is cut short")
        exchange = PyUnicode_DecodeUTF8(text, record.exchange_size, b"replace")
        text += record.exchange_size
        routing_key = PyUnicode_DecodeUTF8(text, record.routing_key_size, b"replace")
        text += record.routing_key_size
        props = PyBytes_FromStringAndSize(text, record.props_size)
        body = PyBytes_FromStringAndSize(text + record.props_size, record.body_size)
        scan_head(<const uint8_t *> PyBytes_AS_STRING(props), record.props_size, &head)
        # Not the one that runs now: the child may be further on.
        owner = child.call_of(record.seq)
        message = Message(
            exchange, routing_key, props, body,
            read_text(PyBytes_AS_STRING(props) + head.id.offset, head.id.length),
            head.priority, head.eta or None, head.expires or None)
        if owner is not None:
            owner.pending += 1
        return self.publish(message, owner)

    cdef int on_state(self, Child child, const uint8_t *p, Py_ssize_t size) except -1:
        """An intermediate state to store."""
        cdef StateRecord record
        cdef const char *text = <const char *> p + sizeof(StateRecord)
        cdef Delivery owner
        if size < <Py_ssize_t> sizeof(StateRecord):
            raise LocalProtocolError("state record is cut short")
        memcpy(&record, p, sizeof(StateRecord))
        if <uint64_t> size != sizeof(StateRecord) + record.id_size + record.state_size + <uint64_t> record.meta_size:
            raise LocalProtocolError("state record is cut short")
        task_id = read_text(text, record.id_size)
        state = PyUnicode_DecodeUTF8(text + record.id_size, record.state_size, b"replace")
        meta = PyBytes_FromStringAndSize(text + record.id_size + record.state_size, record.meta_size)
        owner = child.call_of(record.seq)
        if self.store is not None:
            reply_to = "" if owner is None else self.reply_to(owner)
            if not self.store.dead:
                # Confirmed, unless by the broker itself, so that a store that takes nothing is not handed ever more.
                self.store.keep_result(None, task_id, state, meta, reply_to, self.store not in self.sources)
        elif owner is not None and self.rpc_results and owner.head.reply_to.length:
            # Celery's code in a child may have recorded the end itself.
            self.reply(owner, encode_result_properties(text, record.id_size), meta, state in READY_STATES)
        return 0

    cdef str reply_to(self, Delivery delivery):
        return PyUnicode_DecodeUTF8(
            PyBytes_AS_STRING(delivery.props) + delivery.head.reply_to.offset, delivery.head.reply_to.length, b"replace")

    # --- save, publish, settle

    cdef int save(self, Delivery delivery, str state, bytes meta, bint final) except -1:
        """Give a result to the store. ``final``: the delivery is settled only once it is stored."""
        cdef bint waits
        cdef bytes props
        if self.store is not None:
            # Saves and verdicts of one source are carried out in order: nothing to wait for.
            waits = final and (delivery.source is not self.store or self.store.dead)
            if self.store.keep_result(delivery, delivery_id(delivery), state, meta, self.reply_to(delivery), waits):
                delivery.pending += 1
            elif waits:
                self.hooks.result_lost(delivery_task(delivery), delivery_id(delivery))
            return 0
        if self.rpc_results and delivery.head.reply_to.length:
            props = encode_result_properties(PyBytes_AS_STRING(delivery.props) + delivery.head.id.offset, delivery.head.id.length)
            return self.reply(delivery, props, meta, final)
        if self.rpc_results and final and self.answers_all:
            delivery.pending += 1
            self.hooks.unaddressed(delivery_id(delivery), meta, delivery)
        return 0

    cdef int reply(self, Delivery delivery, bytes props, bytes meta, bint final) except -1:
        """Send a state to who called. All that a call replies takes this way, so that it arrives in order."""
        if final:
            delivery.pending += 1
        return self.publish(Message("", self.reply_to(delivery), props, meta), delivery if final else None)

    cdef int publish(self, Message message, Delivery owner) except -1:
        if self.outlet is None:
            self.backlog.append((message, owner))
            return 0
        try:
            return self.outlet.send(message, owner)
        except EncodeError as error:
            self.hooks.unsendable(message.id, message.routing_key, str(error))
        # Running the task again would not help: the message stays what it is.
        return 0 if owner is None else self.on_confirmed(owner, True)

    cdef int on_confirmed(self, Delivery delivery, bint stored) except -1:
        """A result or a follow-up of this delivery is safe, or the broker refused it."""
        delivery.pending -= 1
        if not stored:
            # Its follow-up does not exist: run it again rather than lose what was to come.
            delivery.unsafe = True
            self.hooks.unconfirmed(delivery_task(delivery), delivery_id(delivery))
        if delivery.state == FINISHED:
            self.conclude(delivery)
        return 0

    cdef int conclude(self, Delivery delivery) except -1:
        """Settle a finished delivery, now or when everything it waits for is confirmed."""
        if delivery.pending == 0:
            self.settle(delivery, REQUEUE if delivery.unsafe and delivery.verdict == ACK else delivery.verdict)
        return 0

    cdef int settle(self, Delivery delivery, int verdict) except -1:
        if delivery.state == SETTLED:
            return 0
        if verdict == REJECT and not delivery.settled:
            name, task_id = delivery_task(delivery) or "?", delivery_id(delivery) or "?"
            delivery.reason = f"{name}[{task_id}]: {delivery.reason or 'rejected'}"
            if delivery.source.dead_letter is not None and not delivery.oversized \
                    and delivery.source.dead_letter(delivery, delivery.reason):
                self.move(delivery, FINISHED)
                delivery.pending += 1
                return 0
        return self.tell(delivery, verdict)

    cdef int tell(self, Delivery delivery, int verdict) except -1:
        """Have the broker hear of the verdict, unless it was told before the call ran."""
        self.move(delivery, SETTLED)
        if not delivery.settled:
            delivery.settled = True
            delivery.source.tell(delivery, verdict)
        return 0

    def buried(self, Delivery delivery, bint is_moved) -> None:
        """A rejected message is among the dead letters, by the source's ``dead_letter``; else the broker is to move it."""
        delivery.pending -= 1
        if delivery.state == FINISHED:
            self.tell(delivery, ACK if is_moved else REJECT)
        self.on_batch()

    cdef int flush(self, bint now) except -1:
        for each in self.sources:
            (<Source> each).flush(now)
        if self.outlet is not None:
            self.outlet.flush(now)
        if self.store is not None and self.store not in self.sources:
            self.store.flush(True)
        return 0

    cdef int on_batch(self) except -1:
        """The end of a batch of anything: hand over what waits, write what is due, see when to look again."""
        cdef bint idle
        if self.looping:
            return 0
        self.looping = True
        try:
            self.dispatch()
            idle = self.unsettled() == 0
            if idle and self.stopping and self.handed:
                # Nothing runs any more that could bring their verdicts.
                self.give_back_handed()
            self.flush(idle)
            self.arm()
            if idle and self.on_idle is not None:
                self.on_idle()
        finally:
            self.looping = False
        return 0

    # --- time

    cdef int arm(self) except -1:
        """Set the timer for the next thing that only time brings."""
        cdef double delay = 0, now
        cdef Child child
        for each in self.sources:
            if (<Source> each).owes():
                delay = TICK_S
        for each in self.children:
            child = <Child> each
            if child.slots > 1:
                if delay == 0 and child.outstanding():
                    delay = LIMIT_TICK_S
            elif child.outstanding() > 1 and not child.limited:
                delay = TICK_S
            elif delay == 0 and child.outstanding() and self.has_limit(child):
                delay = LIMIT_TICK_S
        if delay == 0 and len(self.later):
            delay = self.later.first_due() - read_clock()
            if delay > ETA_TICK_S:
                delay = ETA_TICK_S
            if delay < 0.0005:
                delay = 0.0005
        if delay == 0:
            return 0
        now = monotonic_ns() * 1e-9
        if self.timer is not None:
            if self.timer_at <= now + delay:
                return 0
            self.timer.cancel()
        self.timer_at = now + delay
        self.timer = self.loop.call_later(delay, self.tick)
        return 0

    cdef bint has_limit(self, Child child) except -1:
        cdef Delivery delivery
        for delivery in child.held():
            if self.limit_of(delivery):
                return True
        return False

    def tick(self) -> None:
        """Do what is due by the clock."""
        self.timer = None
        self.check_children()
        self.wake_etas()
        self.dispatch()
        self.flush(True)
        self.on_batch()

    cdef int check_children(self) except -1:
        """Collect what children hold back, take back what waits behind a long call, enforce hard limits."""
        cdef Child child
        cdef Delivery running
        cdef double ran, limit
        for each in list(self.children):
            child = <Child> each
            if child.outstanding() == 0:
                continue
            self.collect(child)
            if child.slots > 1:
                self.check_many(<ManyChild> child)
                continue
            running = child.call_of(load32(&child.reader.shared.started))
            if running is None:
                continue
            ran = <double> (monotonic_ns() - load64s(&child.reader.shared.started_ns))
            if child.outstanding() > 1 and ran > STUCK_NS and not child.limited:
                self.take_back(child)
            limit = self.limit_of(running)
            if limit and ran * 1e-9 > limit and not child.killed_for:
                child.kill_for(limit)
                self.hooks.hard_limit(child, delivery_task(running), delivery_id(running), limit)
        return 0

    cdef int check_many(self, ManyChild child) except -1:
        """The same for a child of several calls at a time, whose loop may stand still besides."""
        cdef int64_t now = monotonic_ns()
        cdef uint32_t started = load32(&child.reader.shared.started)
        cdef Delivery delivery
        cdef bint is_still = started + 1 < child.next and not child.limited
        if not is_still:
            child.unstarted_since_ns = 0
        elif child.unstarted_since_ns == 0:
            child.unstarted_since_ns = now
        elif now - child.unstarted_since_ns > STUCK_NS:
            self.take_back(child)
        if child.stall_ns and not child.sacrificed:
            self.check_turns(child, now)
        if self.grace and child.left and not child.sacrificed and (now - child.left_since_ns) * 1e-9 > self.grace:
            self.sacrifice(child, f"{child.count} calls of it run on {self.grace:g} s after one was left behind")
        for seq, limit in list(child.limits.items()):
            delivery = child.call_of(seq)
            if delivery is None or seq > started or seq in child.cancelled:
                continue
            if (now - child.started_at(seq)) * 1e-9 > limit:
                self.hooks.overdue(child, delivery_task(delivery), delivery_id(delivery), limit)
                child.cancel(delivery, "time-limit", limit, 0)
                if child.gives_up:
                    self.give_up(child, delivery)
        for seq, (_, _, since_ns) in list(child.cancelled.items()):
            if now - <int64_t> since_ns > CANCEL_NS and not child.sacrificed:
                delivery = child.call_of(seq)
                if delivery is None:
                    del child.cancelled[seq]
                elif child.gives_up:
                    self.give_up(child, delivery)
                else:
                    self.sacrifice(child, f"task {delivery_task(delivery)}[{delivery_id(delivery)}] does not end")
        return 0

    cdef int check_turns(self, ManyChild child, int64_t now) except -1:
        """See whether a child's event loop stands still."""
        cdef int64_t last = max(child.busy_since_ns, load64s(&child.reader.shared.started_ns))
        if now - last < STALL_NS:
            child.is_stalled = False
            return 0
        if not child.is_stalled:
            child.is_stalled = True
            self.stalls += 1
            self.hooks.stalled(child, (now - last) * 1e-9)
        if now - last > child.stall_ns:
            child.is_stuck = True
            self.sacrifice(child, f"its event loop has taken no turn for {(now - last) * 1e-9:.0f} s")
        return 0

    cdef int give_up(self, ManyChild child, Delivery delivery) except -1:
        """Leave a call behind that does not end: nothing of its process is taken any more once the others have ended."""
        kind, detail, _ = child.cancelled[delivery.seq]
        child.give_up(delivery)
        self.end_cancelled(delivery, kind, detail)
        if child.outstanding():
            self.pool.child_full(child)
        else:
            self.pool.child_drained(child)
        return 0

    cdef int sacrifice(self, ManyChild child, str why) except -1:
        """Kill a child for the sake of one call that does not end: its others run again, uncounted."""
        child.sacrificed = True
        child.retire()
        self.hooks.hopeless(child, why)
        return 0

    cdef int take_back(self, Child child) except -1:
        """Take the calls that a child has not started away from it. It answers each of them with RETURNED when it gets there."""
        cdef uint32_t started = load32(&child.reader.shared.started)
        cdef Delivery delivery
        if child.outstanding() == 0 or child.gone:
            return 0
        if started < child.first:
            started = child.first
        if child.slots > 1:
            # What was acknowledged early is not taken back: nobody else has it any more.
            for delivery in child.held():
                if delivery.settled and delivery.seq > started:
                    started = delivery.seq
        store32(&child.reader.shared.limit, started)
        child.limited = True
        # What has started since is decided by the child's answer; what is beyond that cannot start any more.
        if load32(&child.reader.shared.started) > started:
            started = load32(&child.reader.shared.started)
        for delivery in reversed(child.take_unstarted(started)):
            self.release(delivery)
        if child.slots > 1 and not (<ManyChild> child).taken:
            child.limited = False
            store32(&child.reader.shared.limit, NO_LIMIT)
        return 0

    cdef int wake_etas(self) except -1:
        cdef double now = read_clock()
        cdef Delivery delivery = self.later.take_due(now)
        while delivery is not None:
            self.admit(delivery)
            delivery = self.later.take_due(now)
        return 0

    # --- stop

    def hold(self) -> None:
        """Start nothing more. What waits stays here, where others cannot take it, until ``quiet`` gives it back."""
        self.on_hold = True
        for child in self.children:
            self.take_back(<Child> child)

    def resume(self) -> None:
        """Undo ``hold``."""
        self.on_hold = False
        self.on_batch()

    def quiet(self) -> None:
        """Start nothing more: give back what waits and what children have not started. What runs goes on."""
        cdef Delivery each
        self.stopping = True
        for line in self.lines:
            for each in (<WaitingLine> line).clear():
                self.settle(each, RETURN)
        for _, _, each in self.later.clear():
            self.settle(each, RETURN)
        for child in self.children:
            self.take_back(<Child> child)
        self.flush(True)
        self.on_batch()

    def give_back_running(self, bint forget=True) -> None:
        """Give back what still runs (late acknowledgement only): the worker ends without waiting for it.

        What was acknowledged early is forgotten, or else left to ``remove_child``, which records its loss.
        """
        cdef Delivery delivery
        cdef Child child
        for each in self.children:
            child = <Child> each
            self.collect(child)
            for delivery in child.held():
                if forget or not delivery.settled:
                    self.settle(delivery, REQUEUE)
        self.flush(True)

    # --- remote control

    @property
    def revoked(self) -> object:
        """The container of ids that must not run; None: nothing is revoked."""
        return self.revoked_ids

    @revoked.setter
    def revoked(self, object ids) -> None:
        self.revoked_ids = ids
        if ids is None:
            return
        # What children hold in advance passes here again before it runs.
        for child in self.children:
            self.take_back(<Child> child)
        self.on_batch()

    def terminate(self, set ids, int signum) -> list[str]:
        """Have the calls with these ids that run now ended by a signal to their process; return their ids."""
        cdef Delivery running
        cdef list found = []
        for each in list(self.children):
            for running in (<Child> each).running():
                if delivery_id(running) in ids and self.end_running(<Child> each, running, signum):
                    found.append(delivery_id(running))
        return found

    cdef bint end_running(self, Child child, Delivery running, int signum) except -1:
        """Have a running call ended; False when it is being ended already."""
        if child.slots > 1:
            if running.seq in (<ManyChild> child).cancelled:
                return False
            (<ManyChild> child).cancel(running, "terminated", signum, signum)
            self.arm()
            return True
        if child.terminated_by:
            return False
        child.terminate_for(signum)
        self.hooks.terminate(child, signum)
        return True

    @property
    def is_store_away(self) -> bool:
        """Whether results cannot be stored at present."""
        return self.store is not None and (self.store.dead or self.store.is_stuck)

    def cancel_lost(self, int signum) -> None:
        """End the running calls whose connection is gone before they were acknowledged: they run again elsewhere."""
        cdef Delivery running
        for each in list(self.children):
            for running in (<Child> each).running():
                if running.source.dead and not running.settled:
                    self.end_running(<Child> each, running, signum)
