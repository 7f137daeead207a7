# cython: language_level=3
"""The processes of the pool as the message loop feeds them, and what it knows of tasks. No decisions about messages."""

from os import MFD_CLOEXEC, close, ftruncate, memfd_create

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8

from fastq.link cimport Delivery
from fastq.wire.head cimport read_text
from fastq.wire.pipe cimport (
    RECORD_CALL, RECORD_CANCEL, RECORD_SLOT, RECORD_STOP, CallRecord, load32, load64s, monotonic_ns, places_of, store32)

from fastq.errors import LocalProtocolError
from fastq.wire.pipe import SHARED_SIZE


cdef class Keeper(Sink):
    cdef int on_bell(self, Child child) except -1:
        return 0


cdef class TaskRules:
    """What the main process knows of a task: its name and how its calls are to be treated. Limits in seconds, 0 = none."""

    def __init__(self, str name, *, bint acks_late=True, bint ignore_result=False, bint requeue_lost=True,
                 bint reject_failed=False, bint handed_over=False, bint handed_in_turn=False,
                 double time_limit=0, double soft_time_limit=0, double rate_limit=0, int group=0):
        self.name = name
        self.group = group
        self.key = name.encode()
        self.acks_late = acks_late
        self.ignore_result = ignore_result
        self.requeue_lost = requeue_lost
        self.reject_failed = reject_failed
        self.handed_over = handed_over
        self.handed_in_turn = handed_in_turn
        self.rate_limit = rate_limit
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

    def __init__(self, Keeper keeper, int slot, int pid, RingReader reader, *, int group=0):
        self.keeper = keeper
        self.group = group
        self.slots = 1
        self.mask = SENT_SLOTS - 1
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
        if self.gone:
            transport.abort()
            return
        self.transport = transport
        self.write_bytes = transport.write
        self.flush()

    def get_buffer(self, Py_ssize_t sizehint) -> object:
        return self.bell_view

    def buffer_updated(self, Py_ssize_t count) -> None:
        # Lower the flag before looking: what the child writes from here on rings again.
        store32(&self.reader.shared.rung, 0)
        self.keeper.on_bell(self)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self.accepting = False

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass

    def activate(self, int slot) -> None:
        """Take calls from now on, in that slot."""
        if slot != self.slot:
            self.slot = slot
            self.write_control(RECORD_SLOT, slot)
        self.accepting = not self.retiring
        self.keeper.on_batch()

    def retire(self) -> None:
        """Take no more calls; what it holds is finished."""
        self.retiring = True
        self.accepting = False

    def stop(self) -> None:
        """Ask the process to end after the call it runs."""
        self.retire()
        if not self.gone:
            self.write_control(RECORD_STOP, 0)

    def close(self) -> None:
        """Let go of socket and memory: the process has ended, and all that it has written was read."""
        self.gone = True
        self.accepting = False
        transport, self.transport, self.write_bytes = self.transport, None, None
        if transport is not None:
            # What the child has forked may hold the other end: no end of file would come.
            transport.abort()
        self.reader = nobody()

    def kill_for(self, double limit) -> None:
        """Note that the process is being killed because the call that runs is past its hard limit; it starts no other."""
        self.killed_for = limit
        self.killed_seq = load32(&self.reader.shared.started)
        store32(&self.reader.shared.limit, self.killed_seq)
        self.retire()

    def terminate_for(self, int signum) -> None:
        """Note that the call that runs is revoked and that its process gets this signal; it starts no other."""
        self.terminated_by = signum
        self.killed_seq = load32(&self.reader.shared.started)
        store32(&self.reader.shared.limit, self.killed_seq)
        store32(&self.reader.shared.terminated, self.killed_seq)
        self.retire()

    @property
    def busy(self) -> int:
        """Calls it holds."""
        return self.outstanding()

    @property
    def calls(self) -> list[tuple[Delivery, float]]:
        """The calls it holds, those that run first, each with the seconds since its start (-1: not started)."""
        cdef uint32_t started = load32(&self.reader.shared.started)
        cdef int64_t now = monotonic_ns()
        cdef Delivery each
        cdef list held = []
        for each in self.held():
            held.append((each, (now - self.started_at(each.seq)) * 1e-9 if each.seq <= started else -1.0))
        return held

    @property
    def running_tasks(self) -> list[tuple[str, str, float]]:
        """Name, id and seconds since its start of each call that runs."""
        cdef Delivery each
        return [((<TaskRules> each.options).name, delivery_id(each), ran) for each, ran in self.calls if ran >= 0]

    cdef uint32_t outstanding(self) noexcept:
        """How many calls it has not answered, those that were taken back included."""
        return self.next - self.first

    cdef bint has_free_place(self) noexcept:
        """Whether a call that it is given starts at once."""
        return self.next == self.first

    cdef list held(self):
        """The calls that it is to answer, in the order of their numbers."""
        cdef uint32_t seq
        cdef list found = []
        for seq in range(self.first, self.next):
            if self.sent[seq & self.mask] is not None:
                found.append(self.sent[seq & self.mask])
        return found

    cdef list running(self):
        """The calls that it has started and not answered."""
        cdef Delivery found = self.call_of(load32(&self.reader.shared.started))
        return [] if found is None else [found]

    cdef int64_t started_at(self, uint32_t seq) noexcept:
        """When it has started this call, which runs, on the monotonic clock."""
        return load64s(&self.reader.shared.started_ns)

    cdef Delivery call_of(self, uint32_t seq):
        """The call of this number, None when it is not one that the child has."""
        if seq < self.first or seq >= self.next:
            return None
        return <Delivery> self.sent[seq & self.mask]

    cdef Delivery answer(self, uint32_t seq):
        """Take out the call that the child has ended; None: it was taken back. Raises LocalProtocolError for no such call."""
        cdef Delivery delivery
        if seq != self.first or self.next == self.first:
            raise LocalProtocolError(f"child {self.pid} answered call {seq}, call {self.first} was due")
        delivery = <Delivery> self.sent[seq & self.mask]
        self.sent[seq & self.mask] = None
        self.first += 1
        return delivery

    cdef list take_unstarted(self, uint32_t started):
        """Take out and return the calls behind that number, of which none can start any more."""
        cdef uint32_t seq
        cdef list found = []
        for seq in range(max(started + 1, self.first), self.next):
            if self.sent[seq & self.mask] is not None:
                found.append(self.sent[seq & self.mask])
                self.sent[seq & self.mask] = None
        return found

    cdef int write_control(self, uint8_t kind, uint32_t seq, int number=0) except -1:
        cdef CallRecord record
        record.size = sizeof(CallRecord)
        record.kind = kind
        record.seq = seq
        record.deliveries = <uint32_t> number
        self.out.put(&record, sizeof(CallRecord))
        return self.flush()

    cdef int write_call(self, Delivery delivery, bint wants_result, bint wants_report, double time_limit,
                        double soft_time_limit) except -1:
        cdef CallRecord record
        record.kind = RECORD_CALL
        record.redelivered = delivery.deliveries > 1
        record.wants_result = wants_result
        record.wants_report = wants_report
        record.is_own = delivery.source.is_own
        record.seq = self.next
        record.deliveries = <uint32_t> delivery.deliveries
        record.time_limit = time_limit
        record.soft_time_limit = soft_time_limit
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
        self.sent[self.next & self.mask] = delivery
        self.next += 1
        self.given += 1
        return 0

    cdef int flush(self) except -1:
        if self.out.size and not self.gone and self.write_bytes is not None:
            self.write_bytes(self.out.take())
        return 0


cdef class ManyChild(Child):
    """A child that runs several calls at a time. It starts them at once and in order, and answers them in any.

    ``gives_up``: a call that does not end when it is told to is left behind, and the process replaced once its others
    have ended, for which they have the worker's grace; else the process is killed, and the others run again. ``stall_s``: an
    event loop runs them, and the process is killed too when that has taken no turn for so long (0: no loop).
    """

    def __init__(self, Keeper keeper, int slot, int pid, RingReader reader, *, int slots, int group=0, bint gives_up=False,
                 double stall_s=0):
        super().__init__(keeper, slot, pid, reader, group=group)
        self.slots = max(2, slots)
        self.most = slots
        self.gives_up = gives_up
        self.stall_ns = <int64_t> (stall_s * 1e9)
        self.mask = <uint32_t> places_of(self.slots) - 1
        self.sent = [None] * (self.mask + 1)
        self.taken = set()
        self.left = set()
        self.limits = {}
        self.cancelled = {}

    cdef uint32_t outstanding(self) noexcept:
        return self.count

    cdef bint has_free_place(self) noexcept:
        return self.count < self.most and not self.alone

    cdef list held(self):
        return sorted([each for each in self.sent if each is not None], key=_number)

    cdef list running(self):
        cdef uint32_t started = load32(&self.reader.shared.started)
        cdef Delivery each
        cdef list found = []
        for each in self.sent:
            if each is not None and each.seq <= started:
                found.append(each)
        return found

    cdef int64_t started_at(self, uint32_t seq) noexcept:
        if self.reader.starts == NULL:
            return monotonic_ns()   # its memory was let go of
        return load64s(self.reader.starts + (seq & self.mask))

    cdef Delivery call_of(self, uint32_t seq):
        cdef Delivery found = <Delivery> self.sent[seq & self.mask]
        return found if found is not None and found.seq == seq else None

    cdef Delivery answer(self, uint32_t seq):
        cdef Delivery found = self.call_of(seq)
        if found is not None:
            self.sent[seq & self.mask] = None
        elif seq in self.left:
            self.left.remove(seq)
            return None
        elif seq in self.taken:
            self.taken.remove(seq)
        else:
            raise LocalProtocolError(f"child {self.pid} answered call {seq}, which it does not have")
        self.limits.pop(seq, None)
        self.count -= 1
        self.alone = False
        return found

    cdef list take_unstarted(self, uint32_t started):
        cdef Delivery each
        cdef list found = []
        for each in self.held():
            if each.seq > started:
                self.sent[each.seq & self.mask] = None
                self.taken.add(each.seq)
                self.limits.pop(each.seq, None)
                found.append(each)
        return found

    cdef int write_call(self, Delivery delivery, bint wants_result, bint wants_report, double time_limit,
                        double soft_time_limit) except -1:
        while self.sent[self.next & self.mask] is not None:
            self.next += 1      # there are twice as many places as calls
        if time_limit:
            self.limits[self.next] = time_limit
        if self.count == 0:
            self.busy_since_ns = monotonic_ns()
        self.count += 1
        return Child.write_call(self, delivery, wants_result, wants_report, time_limit, soft_time_limit)

    cdef int cancel(self, Delivery delivery, str kind, object detail, int signum) except -1:
        """Tell the child to end one of its calls; what it says of it comes too late."""
        self.cancelled[delivery.seq] = (kind, detail, monotonic_ns())
        return self.write_control(RECORD_CANCEL, delivery.seq, signum)

    cdef int give_up(self, Delivery delivery) except -1:
        """Leave a call behind: the child is given no more, and the answer to this one is not waited for."""
        self.sent[delivery.seq & self.mask] = None
        self.limits.pop(delivery.seq, None)
        self.cancelled.pop(delivery.seq, None)
        self.count -= 1
        if self.left_since_ns == 0:
            self.left_since_ns = monotonic_ns()
        self.left.add(delivery.seq)
        self.retire()
        return 0


def _number(Delivery delivery):
    return delivery.seq


cdef RingReader NOBODY = None


cdef RingReader nobody():
    """Memory in which nobody ever writes, for children whose own was let go of."""
    global NOBODY
    if NOBODY is None:
        shared = memfd_create("fastq-nobody", MFD_CLOEXEC)
        try:
            ftruncate(shared, SHARED_SIZE)
            NOBODY = RingReader(shared)
        finally:
            close(shared)
    return NOBODY


cdef str delivery_id(Delivery delivery):
    return read_text(PyBytes_AS_STRING(delivery.props) + delivery.head.id.offset, delivery.head.id.length)


cdef str delivery_task(Delivery delivery):
    return PyUnicode_DecodeUTF8(
        PyBytes_AS_STRING(delivery.props) + delivery.head.task.offset, delivery.head.task.length, b"replace")
