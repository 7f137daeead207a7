# cython: language_level=3
"""The message loop: admit deliveries, hand them to children, collect outcomes, save results, settle. No I/O of its own.

Everything happens on the event loop's thread. Per message nothing leaves compiled code; Python is called once per batch, and
for what is rare: refusals, failures that are recorded here, a child that must be killed or replaced.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.string cimport memcmp, memcpy

from fastq.link cimport ACK, DISPATCHED, FINISHED, LEDGER_STATES, RECEIVED, REJECT, REQUEUE, RETURN, SETTLED, STARTED
from fastq.wire.message cimport FINE, Head, encode_result_properties, is_utf8, read_clock, scan_head
from fastq.wire.pipe cimport (
    FLAG_RECYCLE, OUTCOME_MALFORMED, OUTCOME_REJECTED, OUTCOME_REQUEUE,
    OUTCOME_RETURNED, OUTCOME_UNKNOWN, RECORD_CALL, RECORD_OUTCOME, RECORD_PUBLISH, RECORD_READY, RECORD_STATE,
    RECORD_STOP, CallRecord, OutcomeRecord, PublishRecord, StateRecord, load32, load64s, monotonic_ns, store32)

from heapq import heappop, heappush

from fastq.errors import EncodeError, LocalProtocolError
from fastq.wire.message import PROBLEMS

cdef enum:
    NO_LIMIT = 0xFFFFFFFF
    MAX_ADVANCE_BYTES = 1 << 20
    STATE_COUNT = 9

# A child is given calls in advance for as long as they will probably take less than this together: long enough to hide the
# hand-over (measured about 0.1 ms with both sides asleep), short enough that nothing waits noticeably behind them.
cdef double ADVANCE_NS = 2e6
# Calls of one batch go to the same idle child for as long as this together: waking another costs more (measured 50 to 100 µs).
cdef double PACK_NS = 0.2e6
cdef double STUCK_NS = 10e6     # after this a running call is long: what waits behind it is taken back
cdef double TICK_S = 0.005      # acks and held outcomes wait at most this long
cdef double LIMIT_TICK_S = 0.05     # precision of hard time limits
cdef double ETA_TICK_S = 1.0    # the wall clock is looked at again at least this often, so a jump delays nothing longer

_STATES = ("SUCCESS", "FAILURE", "RETRY", "IGNORED", "REJECTED", "REJECTED", "REJECTED", "RECEIVED", "FAILURE")


cdef class TaskOptions:
    """What the main process knows of a task: its name and how its calls are to be treated. Limits in seconds, 0 = none."""

    def __init__(self, str name, *, bint acks_late=True, bint ignore_result=False, bint requeue_lost=True,
                 double time_limit=0, double soft_time_limit=0):
        self.name = name
        self.key = name.encode()
        self.acks_late = acks_late
        self.ignore_result = ignore_result
        self.requeue_lost = requeue_lost
        self.time_limit = time_limit
        self.soft_time_limit = soft_time_limit
        self.run_ns = -1
        self.runs = 0

    cdef int note_run(self, double ns) except -1:
        self.runs += 1
        # Slow runs count at once, fast ones by and by: being too generous hoards, being too careful only costs time.
        if self.run_ns < 0 or ns > self.run_ns * 4:
            self.run_ns = ns
        else:
            self.run_ns += (ns - self.run_ns) * 0.125
        return 0


# --- children ---------------------------------------------------------------------------------------------------------

cdef class Child:
    """One process of the pool: an asyncio.BufferedProtocol over its socket, which carries calls one way and doorbells the other."""

    def __init__(self, Core core, int slot, int pid, RingReader reader):
        self.core = core
        self.slot = slot
        self.pid = pid
        self.reader = reader
        self.bell = bytearray(4096)
        self.bell_view = memoryview(self.bell)
        self.out = Writer()
        self.sent = [None] * SENT_SLOTS
        self.first = 1
        self.next = 1
        self.accepting = False

    def connection_made(self, transport: object) -> None:
        self.transport = transport
        self.write_bytes = transport.write
        self.flush()

    def get_buffer(self, Py_ssize_t sizehint) -> object:
        return self.bell_view

    def buffer_updated(self, Py_ssize_t count) -> None:
        # Lower the flag before looking: what the child writes from here on rings again.
        store32(&self.reader.shared.rung, 0)
        self.core.collect(self)
        self.core.on_batch()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self.accepting = False

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass

    def activate(self) -> None:
        """Take calls from now on."""
        self.accepting = not self.retiring
        self.core.on_batch()

    def retire(self) -> None:
        """Take no more calls; what it holds is finished."""
        self.retiring = True
        self.accepting = False

    def stop(self) -> None:
        """Ask the process to end after the call it runs."""
        cdef CallRecord record
        self.retire()
        if self.gone:
            return
        record.size = sizeof(CallRecord)
        record.kind = RECORD_STOP
        self.out.put(&record, sizeof(CallRecord))
        self.flush()

    def kill_for(self, double limit) -> None:
        """Note that the process is being killed because the call that runs is past its hard limit; it starts no other."""
        self.killed_for = limit
        self.killed_seq = load32(&self.reader.shared.started)
        store32(&self.reader.shared.limit, self.killed_seq)
        self.retire()

    @property
    def busy(self) -> int:
        """Calls it holds."""
        return self.outstanding()

    @property
    def running_task(self) -> tuple[str, str, float] | None:
        """Name, id and seconds since its start of the call that runs, None when idle."""
        cdef Delivery delivery = self.running()
        if delivery is None:
            return None
        return ((<TaskOptions> delivery.options).name, delivery_id(delivery),
                (monotonic_ns() - load64s(&self.reader.shared.started_ns)) * 1e-9)

    cdef uint32_t outstanding(self) noexcept:
        return self.next - self.first

    cdef Delivery running(self):
        """The call it has started and not answered, None when there is none."""
        cdef uint32_t seq = load32(&self.reader.shared.started)
        if seq < self.first or seq >= self.next:
            return None
        return <Delivery> self.sent[seq & (SENT_SLOTS - 1)]

    cdef int write_call(self, Delivery delivery, bint wants_result) except -1:
        cdef CallRecord record
        cdef TaskOptions task = <TaskOptions> delivery.options
        record.kind = RECORD_CALL
        record.redelivered = delivery.deliveries > 1
        record.wants_result = wants_result
        record.pad = 0
        record.seq = self.next
        record.deliveries = <uint32_t> delivery.deliveries
        record.time_limit = self.core.limit_of(delivery)
        record.soft_time_limit = delivery.head.soft_time_limit
        if record.soft_time_limit < 0:
            record.soft_time_limit = task.soft_time_limit or self.core.soft_time_limit
        record.exchange_size = <uint16_t> PyBytes_GET_SIZE(delivery.exchange)
        record.routing_key_size = <uint16_t> PyBytes_GET_SIZE(delivery.routing_key)
        record.props_size = <uint32_t> PyBytes_GET_SIZE(delivery.props)
        record.body_size = <uint32_t> PyBytes_GET_SIZE(delivery.body)
        record.size = sizeof(CallRecord) + record.exchange_size + record.routing_key_size + record.props_size + record.body_size
        self.out.put(&record, sizeof(CallRecord))
        self.out.put(PyBytes_AS_STRING(delivery.exchange), record.exchange_size)
        self.out.put(PyBytes_AS_STRING(delivery.routing_key), record.routing_key_size)
        self.out.put(PyBytes_AS_STRING(delivery.props), record.props_size)
        self.out.put(PyBytes_AS_STRING(delivery.body), record.body_size)
        delivery.seq = self.next
        self.sent[self.next & (SENT_SLOTS - 1)] = delivery
        self.next += 1
        self.given += 1
        return 0

    cdef int flush(self) except -1:
        self.is_waking = False
        if self.out.size and not self.gone and self.write_bytes is not None:
            self.write_bytes(self.out.take())
        return 0


cdef str delivery_id(Delivery delivery):
    return PyUnicode_DecodeUTF8(
        PyBytes_AS_STRING(delivery.props) + delivery.head.id.offset, delivery.head.id.length, b"replace")


cdef str delivery_task(Delivery delivery):
    return PyUnicode_DecodeUTF8(
        PyBytes_AS_STRING(delivery.props) + delivery.head.task.offset, delivery.head.task.length, b"replace")


# --- the loop ---------------------------------------------------------------------------------------------------------

cdef class Core(Sink):
    """The message loop of one worker.

    ``tasks`` are the TaskOptions by name. ``hooks`` is called for what is rare (see ``worker.hooks``): ``refused``, ``failure``,
    ``hard_limit``, ``child_full``, ``child_ready``, ``received``. Limits are in seconds, 0 = none.
    """

    def __init__(self, object loop, list tasks, object hooks, *, bint reliable=True, int max_deliveries=20, int max_child_deaths=3,
                 uint64_t max_tasks_per_child=0, double time_limit=0, double soft_time_limit=0, bint rpc_results=False):
        self.loop = loop
        self.tasks = {(<TaskOptions> task).key: task for task in tasks}
        self.hooks = hooks
        self.reliable = reliable
        self.max_deliveries = max_deliveries
        self.max_child_deaths = max_child_deaths
        self.max_tasks_per_child = max_tasks_per_child
        self.time_limit = time_limit
        self.soft_time_limit = soft_time_limit
        self.rpc_results = rpc_results
        self.children = []
        self.sources = []
        self.backlog = []
        self.etas = []
        self.ledger = [0] * LEDGER_STATES
        self.refused = {}
        self.outcomes = [0] * STATE_COUNT
        self.run_ns = -1

    # --- parts

    def add_source(self, Source source) -> None:
        """Receive from this source."""
        source.bind(self)
        self.sources.append(source)
        source.flush(True)

    def drop_source(self, Source source) -> None:
        """The source's connection is gone: forget what it brought and has not started; the broker hands it out again."""
        cdef Delivery each
        cdef list kept = []
        source.dead = True
        if source in self.sources:
            self.sources.remove(source)
        each, self.waiting_first, self.waiting_last, self.waiting = self.waiting_first, None, None, 0
        while each is not None:
            following, each.next = each.next, None
            if each.source is source:
                self.move(each, SETTLED)
            else:
                kept.append(each)
            each = following
        for each in kept:
            self.enqueue(each)
        kept = [entry for entry in self.etas if (<Delivery> entry[2]).source is not source]
        for entry in self.etas:
            if (<Delivery> entry[2]).source is source:
                self.move(<Delivery> entry[2], SETTLED)
        kept.sort()
        self.etas = kept
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
        """Save results there."""
        self.store = store
        store.bind(self)

    def add_child(self, Child child) -> None:
        """Watch over a child; it gets calls once ``activate`` was called."""
        self.children.append(child)

    def remove_child(self, Child child, str reason) -> None:
        """A child's process has ended: decide about everything it still held."""
        cdef Delivery delivery
        cdef uint32_t seq, started
        cdef list unstarted = []
        self.collect(child)
        child.gone = True
        child.accepting = False
        if child in self.children:
            self.children.remove(child)
        started = child.killed_seq if child.killed_for else load32(&child.reader.shared.started)
        for seq in range(child.first, child.next):
            delivery = <Delivery> child.sent[seq & (SENT_SLOTS - 1)]
            child.sent[seq & (SENT_SLOTS - 1)] = None
            if delivery is None:
                continue
            if seq == started:
                self.lost(delivery, child, reason)
            else:
                unstarted.append(delivery)
        for delivery in reversed(unstarted):
            self.release(delivery)
        child.first = child.next
        self.on_batch()

    cdef int release(self, Delivery delivery) except -1:
        """A call that did not start is to be run by another child, or goes back to its broker."""
        if delivery.state == SETTLED:
            return 0
        if delivery.source.dead and not delivery.settled:
            self.move(delivery, SETTLED)
        elif self.stopping and not delivery.settled:
            self.settle(delivery, RETURN)
        else:
            self.move(delivery, RECEIVED)
            self.enqueue_first(delivery)
        return 0

    cdef int lost(self, Delivery delivery, Child child, str reason) except -1:
        """The child died while it ran this call."""
        cdef TaskOptions task = <TaskOptions> delivery.options
        if delivery.state == SETTLED:
            return 0    # given back already, as the worker is stopping
        if child.killed_for:
            return self.fail(delivery, "time-limit", child.killed_for, ACK)
        if delivery.settled or not task.requeue_lost:
            return self.fail(delivery, "lost", reason, ACK)
        delivery.deaths += 1
        if delivery.deaths >= self.max_child_deaths:
            # It has killed every child it was given to: to the dead letters, before it takes the others' time.
            return self.fail(delivery, "lost", f"{reason} ({delivery.deaths} times; not run again)", REJECT)
        if self.stopping:
            return self.settle(delivery, REQUEUE)
        if delivery.source.dead:
            return self.move(delivery, SETTLED)
        delivery.deliveries += 1
        self.move(delivery, RECEIVED)
        return self.enqueue_first(delivery)

    # --- admit

    cdef int on_delivery(self, Delivery delivery) except -1:
        """Decide about a delivery: run it, keep it for its time, or refuse it. No content can raise here."""
        cdef int problem = scan_head(<const uint8_t *> PyBytes_AS_STRING(delivery.props), PyBytes_GET_SIZE(delivery.props),
                                     &delivery.head)
        cdef const char *name
        cdef Py_ssize_t size
        cdef TaskOptions task = self.last_task
        self.received += 1
        delivery.state = RECEIVED
        self.ledger[RECEIVED] += 1
        if delivery.oversized:
            return self.refuse(delivery, "oversized")
        if problem != FINE:
            return self.refuse(delivery, <str> PROBLEMS[problem])
        if delivery.head.reply_to.length and not is_utf8(
                <const uint8_t *> PyBytes_AS_STRING(delivery.props) + delivery.head.reply_to.offset, delivery.head.reply_to.length):
            # Nobody can be listening there.
            delivery.head.reply_to.length = 0
        name = PyBytes_AS_STRING(delivery.props) + delivery.head.task.offset
        size = delivery.head.task.length
        if task is None or PyBytes_GET_SIZE(task.key) != size or memcmp(PyBytes_AS_STRING(task.key), name, size) != 0:
            task = <TaskOptions> self.tasks.get(PyBytes_FromStringAndSize(name, size))
            if task is None:
                return self.fail(delivery, "unknown", delivery_task(delivery), REJECT)
            self.last_task = task
        delivery.options = task
        if delivery.head.delivery_count:
            delivery.deliveries = <int> delivery.head.delivery_count + 1
        if self.log_received:
            self.hooks.received(task.name, delivery_id(delivery))
        if self.stopping:
            return self.settle(delivery, RETURN)
        if self.reliable and delivery.deliveries > self.max_deliveries:
            return self.fail(delivery, "deliveries", delivery.deliveries, REJECT)
        if delivery.head.expires and delivery.head.expires <= read_clock():
            return self.fail(delivery, "expired", delivery.head.expires, ACK)
        if delivery.head.eta and delivery.head.eta > read_clock():
            self.eta_order += 1
            heappush(self.etas, (delivery.head.eta, self.eta_order, delivery))
            return 0
        return self.enqueue(delivery)

    cdef int refuse(self, Delivery delivery, str reason) except -1:
        """Reject a message that is not a task message; counted under its class."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.settle(delivery, REJECT)
        self.hooks.refused(reason, delivery.routing_key, delivery.props, delivery.body)
        return 0

    cdef int fail(self, Delivery delivery, str kind, object detail, int verdict) except -1:
        """End a delivery that no child can end: record its failure, then settle it."""
        state, meta = self.hooks.failure(kind, delivery_task(delivery), delivery_id(delivery), detail)
        if kind == "unknown" or kind == "deliveries":
            self.refused[kind] = self.refused.get(kind, 0) + 1
        self.move(delivery, FINISHED)
        delivery.verdict = verdict
        if meta is not None and self.wants_result(delivery):
            self.save(delivery, state, meta, True)
        return self.conclude(delivery)

    cdef int enqueue(self, Delivery delivery) except -1:
        delivery.next = None
        if self.waiting_last is None:
            self.waiting_first = delivery
        else:
            self.waiting_last.next = delivery
        self.waiting_last = delivery
        self.waiting += 1
        return 0

    cdef int enqueue_first(self, Delivery delivery) except -1:
        delivery.next = self.waiting_first
        self.waiting_first = delivery
        if self.waiting_last is None:
            self.waiting_last = delivery
        self.waiting += 1
        return 0

    # --- dispatch

    cdef Child pick(self, TaskOptions task):
        """The child to give the next call to: one that is being woken for short calls, an idle one, or the least loaded one
        that may be given calls in advance."""
        cdef Child child, best = None, idle = None
        cdef uint32_t load
        for each in self.children:
            child = <Child> each
            if not child.accepting or child.limited:
                continue
            load = child.outstanding()
            if load == 0:
                if idle is None:
                    idle = child
                continue
            if child.is_waking and task.run_ns >= 0 and child.expected_ns + task.run_ns <= PACK_NS and load < MAX_ADVANCE:
                return child
            if task.run_ns < 0 or child.expected_ns + task.run_ns > ADVANCE_NS or load >= MAX_ADVANCE:
                continue
            if child.out.size > MAX_ADVANCE_BYTES:
                continue
            if best is None or load < best.outstanding():
                best = child
        return best if idle is None else idle

    cdef int dispatch(self) except -1:
        """Hand waiting deliveries to children for as long as one takes them."""
        cdef Delivery delivery
        cdef Child child
        while self.waiting_first is not None:
            delivery = self.waiting_first
            child = self.pick(<TaskOptions> delivery.options)
            if child is None:
                break
            self.waiting_first = delivery.next
            if self.waiting_first is None:
                self.waiting_last = None
            delivery.next = None
            self.waiting -= 1
            if delivery.head.expires and delivery.head.expires <= read_clock():
                self.fail(delivery, "expired", delivery.head.expires, ACK)
                continue
            self.hand_over(child, delivery)
        for each in self.children:
            (<Child> each).flush()
        return 0

    cdef int hand_over(self, Child child, Delivery delivery) except -1:
        cdef TaskOptions task = <TaskOptions> delivery.options
        cdef bint idle = child.outstanding() == 0
        child.write_call(delivery, self.wants_result(delivery))
        child.expected_ns += task.run_ns if task.run_ns > 0 else ADVANCE_NS
        self.move(delivery, DISPATCHED)
        if idle:
            child.is_waking = True
            self.started(child)
        if self.max_tasks_per_child and child.given >= self.max_tasks_per_child:
            child.retire()
            self.hooks.child_full(child)
        return 0

    cdef bint wants_result(self, Delivery delivery) except -1:
        cdef bint ignored
        if self.store is None and (not self.rpc_results or delivery.head.reply_to.length == 0):
            return False
        ignored = False
        if delivery.options is not None:
            ignored = (<TaskOptions> delivery.options).ignore_result
        if delivery.head.ignore_result >= 0:
            ignored = delivery.head.ignore_result
        return not ignored

    cdef double limit_of(self, Delivery delivery) except -1:
        # What the message says wins, 0 (no limit) included.
        if delivery.head.time_limit >= 0:
            return delivery.head.time_limit
        return (<TaskOptions> delivery.options).time_limit or self.time_limit

    cdef int started(self, Child child) except -1:
        """The oldest call a child holds starts now. Early acknowledgement happens here."""
        cdef Delivery delivery = <Delivery> child.sent[child.first & (SENT_SLOTS - 1)]
        if delivery is None:
            return 0
        self.move(delivery, STARTED)
        if not (<TaskOptions> delivery.options).acks_late and not delivery.settled:
            delivery.settled = True
            delivery.source.tell(delivery, ACK)
        return 0

    # --- collect

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
                    self.hooks.child_ready(child)
                else:
                    raise LocalProtocolError(f"record of unknown kind {kind} from child {child.pid}")
                child.reader.consumed(size)
        except LocalProtocolError as error:
            child.retire()
            self.hooks.child_broken(child, str(error))
        return 0

    cdef int on_outcome(self, Child child, const uint8_t *p, Py_ssize_t size) except -1:
        cdef OutcomeRecord record
        cdef Delivery delivery
        cdef TaskOptions task
        cdef const char *payload = <const char *> p + sizeof(OutcomeRecord)
        cdef bytes meta = None
        cdef str reason = None
        if size < <Py_ssize_t> sizeof(OutcomeRecord):
            raise LocalProtocolError("outcome record is cut short")
        memcpy(&record, p, sizeof(OutcomeRecord))
        if child.answered:
            return 0    # the calls behind one whose time was up are decided with it
        if record.seq != child.first or child.outstanding() == 0 or record.state >= STATE_COUNT:
            raise LocalProtocolError(f"child {child.pid} answered call {record.seq}, call {child.first} was due")
        if <Py_ssize_t> (sizeof(OutcomeRecord) + record.meta_size) > size:
            raise LocalProtocolError("outcome record is cut short")
        if child.killed_for and record.seq == child.killed_seq:
            # Its time was up. What it still says (the stack dump may have interrupted what it waited in) comes too late;
            # it is decided when the process has ended.
            child.answered = True
            return 0
        delivery = <Delivery> child.sent[record.seq & (SENT_SLOTS - 1)]
        child.sent[record.seq & (SENT_SLOTS - 1)] = None
        child.first += 1
        if record.flags & FLAG_RECYCLE and not child.retiring:
            child.retire()
            self.hooks.child_full(child)
        if child.outstanding():
            self.started(child)
        else:
            child.expected_ns = 0
            if child.limited:
                child.limited = False
                store32(&child.reader.shared.limit, NO_LIMIT)
            if child.retiring:
                self.hooks.child_drained(child)
        if delivery is None:
            return 0
        task = <TaskOptions> delivery.options
        child.expected_ns -= task.run_ns if task.run_ns > 0 else ADVANCE_NS
        if child.expected_ns < 0:
            child.expected_ns = 0
        if record.state == OUTCOME_RETURNED:
            return self.release(delivery)
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
        if record.state == OUTCOME_MALFORMED:
            self.refused[reason] = self.refused.get(reason, 0) + 1
            self.hooks.refused(reason, delivery.routing_key, delivery.props, delivery.body)
            delivery.verdict = REJECT
        elif record.state == OUTCOME_UNKNOWN or record.state == OUTCOME_REJECTED:
            delivery.verdict = REJECT
        elif record.state == OUTCOME_REQUEUE:
            delivery.verdict = REQUEUE
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
        owner = child.running()
        message = Message(
            exchange, routing_key, props, body,
            PyUnicode_DecodeUTF8(PyBytes_AS_STRING(props) + head.id.offset, head.id.length, b"replace"),
            head.priority, head.eta or None, head.expires or None)
        if owner is not None:
            owner.pending += 1
        return self.publish(message, owner)

    cdef int on_state(self, Child child, const uint8_t *p, Py_ssize_t size) except -1:
        """An intermediate state to store."""
        cdef StateRecord record
        cdef const char *text = <const char *> p + sizeof(StateRecord)
        cdef Delivery owner = child.running()
        if size < <Py_ssize_t> sizeof(StateRecord):
            raise LocalProtocolError("state record is cut short")
        memcpy(&record, p, sizeof(StateRecord))
        if <uint64_t> size != sizeof(StateRecord) + record.id_size + record.state_size + <uint64_t> record.meta_size:
            raise LocalProtocolError("state record is cut short")
        task_id = PyUnicode_DecodeUTF8(text, record.id_size, b"replace")
        state = PyUnicode_DecodeUTF8(text + record.id_size, record.state_size, b"replace")
        meta = PyBytes_FromStringAndSize(text + record.id_size + record.state_size, record.meta_size)
        if self.store is not None:
            reply_to = "" if owner is None else self.reply_to(owner)
            self.store.keep_result(None, task_id, state, meta, reply_to, False)
        elif owner is not None:
            self.save(owner, state, meta, False)
        return 0

    cdef str reply_to(self, Delivery delivery):
        return PyUnicode_DecodeUTF8(
            PyBytes_AS_STRING(delivery.props) + delivery.head.reply_to.offset, delivery.head.reply_to.length, b"replace")

    # --- save, publish, settle

    cdef int save(self, Delivery delivery, str state, bytes meta, bint final) except -1:
        """Give a result to the store. ``final``: the delivery is settled only once it is stored."""
        cdef bint ours
        cdef bytes props
        if self.store is not None:
            # Saves and verdicts of one source are carried out in order: nothing to wait for.
            ours = delivery.source is self.store
            if final and not ours:
                delivery.pending += 1
            return self.store.keep_result(delivery, delivery_id(delivery), state, meta, self.reply_to(delivery), final and not ours)
        if self.rpc_results and delivery.head.reply_to.length:
            props = encode_result_properties(PyBytes_AS_STRING(delivery.props) + delivery.head.id.offset, delivery.head.id.length)
            if final:
                delivery.pending += 1
            return self.publish(Message("", self.reply_to(delivery), props, meta), delivery if final else None)
        return 0

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
        self.move(delivery, SETTLED)
        if not delivery.settled:
            delivery.settled = True
            delivery.source.tell(delivery, verdict)
        return 0

    cdef int move(self, Delivery delivery, int state) except -1:
        self.ledger[delivery.state] -= 1
        self.ledger[state] += 1
        delivery.state = state
        return 0

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
            self.flush(idle)
            self.arm()
            if idle and self.on_idle is not None:
                self.on_idle()
        finally:
            self.looping = False
        return 0

    cdef Py_ssize_t unsettled(self) except -1:
        return <Py_ssize_t> self.ledger[DISPATCHED] + <Py_ssize_t> self.ledger[STARTED] + <Py_ssize_t> self.ledger[FINISHED] \
            + self.waiting

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
            if child.outstanding() > 1 and not child.limited:
                delay = TICK_S
            elif delay == 0 and child.outstanding() and self.has_limit(child):
                delay = LIMIT_TICK_S
        if delay == 0 and self.etas:
            delay = self.etas[0][0] - read_clock()
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
        cdef uint32_t seq
        for seq in range(child.first, child.next):
            delivery = child.sent[seq & (SENT_SLOTS - 1)]
            if delivery is not None and self.limit_of(<Delivery> delivery):
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
            running = child.running()
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

    cdef int take_back(self, Child child) except -1:
        """Take the calls that a child has not started away from it. It answers each of them with RETURNED when it gets there."""
        cdef uint32_t started = load32(&child.reader.shared.started), seq
        cdef Delivery delivery
        cdef list back = []
        if child.outstanding() == 0 or child.gone:
            return 0
        if started < child.first:
            started = child.first
        store32(&child.reader.shared.limit, started)
        child.limited = True
        # What has started since is decided by the child's answer; what is beyond that cannot start any more.
        if load32(&child.reader.shared.started) > started:
            started = load32(&child.reader.shared.started)
        for seq in range(started + 1, child.next):
            delivery = <Delivery> child.sent[seq & (SENT_SLOTS - 1)]
            if delivery is not None:
                child.sent[seq & (SENT_SLOTS - 1)] = None
                back.append(delivery)
        for delivery in reversed(back):
            self.release(delivery)
        return 0

    cdef int wake_etas(self) except -1:
        cdef double now = read_clock()
        while self.etas and self.etas[0][0] <= now:
            self.enqueue(<Delivery> heappop(self.etas)[2])
        return 0

    # --- stop

    def quiet(self) -> None:
        """Start nothing more: give back what waits and what children have not started. What runs goes on."""
        cdef Delivery each
        self.stopping = True
        each, self.waiting_first, self.waiting_last, self.waiting = self.waiting_first, None, None, 0
        while each is not None:
            following, each.next = each.next, None
            self.settle(each, RETURN)
            each = following
        etas, self.etas = self.etas, []
        for entry in etas:
            self.settle(<Delivery> entry[2], RETURN)
        for child in self.children:
            self.take_back(<Child> child)
        self.flush(True)
        self.on_batch()

    def give_back_running(self) -> None:
        """Give back what still runs (late acknowledgement only): the worker ends without waiting for it."""
        cdef Delivery delivery
        cdef Child child
        cdef uint32_t seq
        for each in self.children:
            child = <Child> each
            self.collect(child)
            for seq in range(child.first, child.next):
                delivery = <Delivery> child.sent[seq & (SENT_SLOTS - 1)]
                if delivery is not None:
                    self.settle(delivery, REQUEUE)
        self.flush(True)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits to run or waits for a confirmation."""
        return self.unsettled() == 0

    def stats(self) -> dict[str, object]:
        """Return the counters: deliveries by ledger state, outcomes, refusals by class."""
        return {
            "received": self.received, "done": self.done, "waiting": self.waiting, "scheduled": len(self.etas),
            "ledger": dict(zip(("received", "dispatched", "started", "finished", "settled"), self.ledger)),
            "outcomes": dict(zip(("success", "failure", "retry", "ignored", "rejected", "requeued", "malformed", "returned",
                                  "unknown"), self.outcomes)),
            "refused": dict(self.refused),
        }
