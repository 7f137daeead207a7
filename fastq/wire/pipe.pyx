# cython: language_level=3
"""The channel between the worker's main process and one child: records over a socket one way, a shared ring the other.

The only system calls are the ones of that socket and memory. The records and who writes what are declared in pipe.pxd.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec
from posix.unistd cimport close

from fastq.wire.head cimport Head, read_text, scan_head
from fastq.wire.message cimport Message

import os

from fastq.errors import EncodeError, LocalProtocolError

cdef extern from "sys/socket.h" nogil:
    ssize_t c_recv "recv"(int fd, void *buf, size_t size, int flags)
    ssize_t c_send "send"(int fd, const void *buf, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

#: Names of the ways a call can end, by their number on the pipe.
OUTCOME_NAMES = ("SUCCESS", "FAILURE", "RETRY", "IGNORED", "REJECTED", "REQUEUE", "MALFORMED", "RETURNED", "UNKNOWN")

SHARED_SIZE = SHARED_BYTES


def shared_size(slots: int = 1) -> int:
    """Return the bytes of the memory that the main process shares with a child of so many calls at a time."""
    return size_for(slots)


cdef Py_ssize_t places_of(Py_ssize_t slots) noexcept nogil:
    """Numbers of calls are told apart by their last bits: places for twice as many as run, a power of two."""
    cdef Py_ssize_t places = 256
    while places < 2 * slots:
        places *= 2
    return places


cdef Py_ssize_t size_for(Py_ssize_t slots) noexcept nogil:
    if slots <= 1:
        return SHARED_BYTES
    return SHARED_BYTES + ((places_of(slots) * <Py_ssize_t> sizeof(int64_t) + PAGE_BYTES - 1) // PAGE_BYTES) * PAGE_BYTES

cdef enum:
    MAX_PROPS = 131072 - 20     # what is left of the usual largest AMQP frame
    NO_LIMIT = 0xFFFFFFFF
    MAX_STACKS = 65536          # faulthandler stops at 100 threads of 100 frames
    BELL_AFTER = 64             # records that may wait for the doorbell; the acks' bound of the reliability rules
    BELL_AFTER_NS = 1000000     # and for how long while calls follow each other


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec


cdef Shared *map_shared(int fd, Py_ssize_t size) except NULL:
    cdef void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if place == MAP_FAILED:
        PyErr_SetFromErrno(OSError)
    return <Shared *> place


cdef class RingReader:
    """The main process's end of a child's shared memory. ``fd`` is a memory file of ``shared_size``; it may be closed after.

    Behind that size the child writes its stacks when it is asked to. ``slots``: calls that the child runs at a time.
    """

    def __cinit__(self, int fd, int slots=1):
        self.fd = -1
        self.size = size_for(slots)
        self.shared = map_shared(fd, self.size)
        self.fd = os.dup(fd)
        self.ring = <uint8_t *> self.shared + PAGE_BYTES
        self.starts = NULL if slots <= 1 else <int64_t *> (<uint8_t *> self.shared + SHARED_BYTES)
        self.scratch = NULL
        store32(&self.shared.limit, NO_LIMIT)

    def __dealloc__(self):
        if self.shared != NULL:
            munmap(self.shared, self.size)
        if self.fd >= 0:
            close(self.fd)
        free(self.scratch)

    def clear_stacks(self) -> None:
        """Have the child write its stacks in the place of those that it has written before."""
        os.ftruncate(self.fd, self.size)
        os.lseek(self.fd, self.size, os.SEEK_SET)   # the child's file is the same one

    def stacks(self) -> str:
        """Return the stacks that the child has written, up to a bound; "" when there are none."""
        return os.pread(self.fd, MAX_STACKS, self.size).decode("utf-8", "replace")

    cdef int copy_out(self, void *target, uint64_t at, Py_ssize_t size) noexcept:
        cdef Py_ssize_t place = at & (RING_BYTES - 1)
        cdef Py_ssize_t first = size if place + size <= RING_BYTES else RING_BYTES - place
        memcpy(target, self.ring + place, first)
        memcpy(<uint8_t *> target + first, self.ring, size - first)
        return 0

    @cython.boundscheck(False)
    cdef const uint8_t *next(self, Py_ssize_t *size) except? NULL:
        """Return the next whole record, NULL when none is complete; valid until ``consumed`` is called.

        The child wrote this memory and may be broken in any way: a size outside the bounds raises LocalProtocolError.
        """
        cdef uint64_t tail = self.shared.tail
        cdef uint64_t available = load64(&self.shared.head) - tail
        cdef uint32_t record
        cdef Py_ssize_t part
        if self.assembling is not None:
            part = PyBytes_GET_SIZE(self.assembling) - self.assembled
            if part > <Py_ssize_t> available:
                part = <Py_ssize_t> available
            self.copy_out(PyBytes_AS_STRING(self.assembling) + self.assembled, tail, part)
            self.assembled += part
            store64(&self.shared.tail, tail + part)
            size[0] = PyBytes_GET_SIZE(self.assembling)
            return <const uint8_t *> PyBytes_AS_STRING(self.assembling) if self.assembled == size[0] else NULL
        if available < 4:
            return NULL
        if available > RING_BYTES:
            raise LocalProtocolError("a child has damaged its shared memory")
        self.copy_out(&record, tail, 4)
        if record < 12 or record > MAX_RECORD:
            raise LocalProtocolError(f"a child has damaged its shared memory: record of {record} bytes")
        if record > RING_BYTES // 2:
            self.assembling = PyBytes_FromStringAndSize(NULL, record)
            self.assembled = 0
            return self.next(size)
        if available < record:
            return NULL
        size[0] = record
        if (tail & (RING_BYTES - 1)) + record <= RING_BYTES:
            return self.ring + (tail & (RING_BYTES - 1))
        if self.scratch == NULL:
            self.scratch = <uint8_t *> malloc(RING_BYTES // 2)
            if self.scratch == NULL:
                raise MemoryError()
        self.copy_out(self.scratch, tail, record)
        return self.scratch

    cdef int consumed(self, Py_ssize_t size) except -1:
        if self.assembling is not None:
            self.assembling = None
            return 0
        store64(&self.shared.tail, self.shared.tail + size)
        return 0

    def take(self) -> bytes | None:
        """Return the next record whole, None when none is complete (for tests)."""
        cdef Py_ssize_t size
        cdef const uint8_t *record = self.next(&size)
        if record == NULL:
            return None
        out = PyBytes_FromStringAndSize(<const char *> record, size)
        self.consumed(size)
        return out

    @property
    def started(self) -> tuple[int, int]:
        """Sequence number of the call started last (0: none yet) and its start in monotonic nanoseconds."""
        return load32(&self.shared.started), load64s(&self.shared.started_ns)


cdef class ChildPipe:
    """The child's end. ``next`` waits for a call; ``finish``, ``publish`` and ``state`` report on the one that runs.

    Where several run at a time (``slots``), ``take`` brings them, and ``owner`` says for which of them code runs.
    """

    def __cinit__(self, int sock, int shared_fd, int slots=1):
        self.sock = sock
        self.slots = slots
        self.capacity = 1 << 16
        self.buffer = <uint8_t *> malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError()
        self.start = self.end = 0
        self.shared = map_shared(shared_fd, size_for(slots))
        self.ring = <uint8_t *> self.shared + PAGE_BYTES
        self.starts = NULL if slots <= 1 else <int64_t *> (<uint8_t *> self.shared + SHARED_BYTES)
        self.unrung = 0
        self.in_parts = False
        self.stopped = self.closed = False
        self.last_exchange = ""
        self.last_routing_key = ""

    def __dealloc__(self):
        free(self.buffer)
        if self.shared != NULL:
            munmap(self.shared, size_for(self.slots))

    # --- calls in

    cdef int fill(self, bint waits) except -1:
        """Read what the socket has, if so waiting for at least one byte; sets ``stopped`` at its end."""
        cdef ssize_t got
        cdef uint8_t *larger
        cdef uint32_t wanted = 0
        if self.start:
            memmove(self.buffer, self.buffer + self.start, self.end - self.start)
            self.end -= self.start
            self.start = 0
        if self.end >= 4:
            memcpy(&wanted, self.buffer, 4)
        if wanted > self.capacity or self.end == self.capacity:
            wanted = max(wanted, <uint32_t> self.capacity * 2)
            larger = <uint8_t *> realloc(self.buffer, wanted)
            if larger == NULL:
                raise MemoryError()
            self.buffer = larger
            self.capacity = wanted
        while True:
            with nogil:
                got = c_recv(self.sock, self.buffer + self.end, self.capacity - self.end, 0 if waits else MSG_DONTWAIT)
            if got > 0:
                self.end += got
                return 0
            if got < 0 and errno == EAGAIN:
                if waits:   # the socket's own time-out, where handlers of signals must not wait for a call to come
                    PyErr_CheckSignals()
                return 0
            if got == 0 or errno == ECONNRESET:    # reset: it has gone without having read our last bell
                self.stopped = self.closed = True
                return 0
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
            PyErr_CheckSignals()

    cdef Call parse(self, const uint8_t *record):
        cdef CallRecord fixed
        cdef Head head
        cdef Call call = Call.__new__(Call)
        cdef const char *p = <const char *> record + sizeof(CallRecord)
        cdef Py_ssize_t size
        cdef const char *last
        memcpy(&fixed, record, sizeof(CallRecord))
        last = PyUnicode_AsUTF8AndSize(self.last_exchange, &size)
        if size != fixed.exchange_size or memcmp(last, p, size) != 0:
            self.last_exchange = PyUnicode_DecodeUTF8(p, fixed.exchange_size, b"replace")
        call.exchange = self.last_exchange
        p += fixed.exchange_size
        last = PyUnicode_AsUTF8AndSize(self.last_routing_key, &size)
        if size != fixed.routing_key_size or memcmp(last, p, size) != 0:
            self.last_routing_key = PyUnicode_DecodeUTF8(p, fixed.routing_key_size, b"replace")
        call.routing_key = self.last_routing_key
        p += fixed.routing_key_size
        call.props = PyBytes_FromStringAndSize(p, fixed.props_size)
        call.body = PyBytes_FromStringAndSize(p + fixed.props_size, fixed.body_size)
        # The main process admitted these properties: the scan finds task and id.
        scan_head(<const uint8_t *> PyBytes_AS_STRING(call.props), fixed.props_size, &head)
        call.name = PyUnicode_DecodeUTF8(PyBytes_AS_STRING(call.props) + head.task.offset, head.task.length, b"replace")
        call.id = read_text(PyBytes_AS_STRING(call.props) + head.id.offset, head.id.length)
        call.retries = <int> head.retries
        call.deliveries = <int> fixed.deliveries
        call.redelivered = fixed.redelivered
        call.wants_result = fixed.wants_result
        call.wants_report = fixed.wants_report
        call.is_own = fixed.is_own
        call.time_limit = fixed.time_limit
        call.soft_time_limit = fixed.soft_time_limit
        call.seq = fixed.seq
        call.json_body = not head.compressed and is_plain_json(
            <const uint8_t *> PyBytes_AS_STRING(call.props), fixed.props_size)
        return call

    def next(self) -> Call | None:
        """Return the next call to run, None when the main process has gone or wants this child to end."""
        cdef uint32_t size, seq
        cdef Call call
        if self.running != 0 and load32(&self.shared.terminated) == self.running:
            # The main process waits for the end of this process, whether or not the task gave way.
            self.stopped = True
            return None
        while True:
            while self.end - self.start < 4:
                if self.stopped:
                    return None
                self.ring_bell()
                self.fill(True)
            memcpy(&size, self.buffer + self.start, 4)
            while self.end - self.start < size:
                if self.stopped:
                    return None
                self.ring_bell()
                self.fill(True)
            memcpy(&seq, self.buffer + self.start + 8, 4)
            if self.buffer[self.start + 4] != RECORD_CALL:
                self.start += size
                self.take_control(self.buffer + self.start - size)
                if self.stopped:
                    return None
                continue
            call = self.parse(self.buffer + self.start)
            self.start += size
            if self.unrung and monotonic_ns() - self.unrung_since > BELL_AFTER_NS:
                self.ring_bell()
            call.started_ns = monotonic_ns()
            store64s(&self.shared.started_ns, call.started_ns)
            # Announce first, then look whether it was taken back: with both sides in this order one of them sees the other.
            store32(&self.shared.started, seq)
            self.running = seq
            if seq > load32(&self.shared.limit):
                self.finish(call, OUTCOME_RETURNED)
                continue
            return call

    cdef bint has_record(self) noexcept:
        """Return whether a whole record has come."""
        cdef uint32_t size
        if self.end - self.start < 4:
            return False
        memcpy(&size, self.buffer + self.start, 4)
        return self.end - self.start >= size

    def take(self, bint waits=False, Py_ssize_t most=0) -> list[Call]:
        """Return the calls that have come, all of which start now; ``waits``: for the next record at least.

        ``most``: no more than so many, the others later (0: all). Once ``stopped`` no more calls come, but calls that run
        may still be cancelled, until it is ``closed``.
        """
        cdef uint32_t size, seq
        cdef Call call
        cdef list found = []
        self.ring_bell()
        if not self.closed:
            self.fill(waits and not self.has_record())
        while self.has_record() and not (most and len(found) == most):
            memcpy(&size, self.buffer + self.start, 4)
            if self.buffer[self.start + 4] != RECORD_CALL:
                self.start += size
                self.take_control(self.buffer + self.start - size)
                continue
            memcpy(&seq, self.buffer + self.start + 8, 4)
            call = self.parse(self.buffer + self.start)
            self.start += size
            call.started_ns = monotonic_ns()
            store64s(self.starts + (seq & (places_of(self.slots) - 1)), call.started_ns)
            store32(&self.shared.started, seq)
            if seq > load32(&self.shared.limit):
                self.finish(call, OUTCOME_RETURNED)
            else:
                found.append(call)
        return found

    cdef int take_control(self, const uint8_t *record) except -1:
        """Do what a record says that is no call."""
        cdef CallRecord fixed
        memcpy(&fixed, record, sizeof(CallRecord))
        if fixed.kind == RECORD_STOP:
            self.stopped = True
        elif fixed.kind == RECORD_SLOT:
            if self.on_slot is not None:
                self.on_slot(fixed.seq)
        elif fixed.kind == RECORD_CANCEL and self.on_cancel is not None:
            self.on_cancel(fixed.seq, <int> fixed.deliveries)
        return 0

    def turn(self) -> None:
        """Say that the loop that runs several calls takes its turns."""
        store64s(&self.shared.started_ns, monotonic_ns())

    def flush(self) -> None:
        """Have the main process read what was reported, at once."""
        self.ring_bell()

    @property
    def is_terminated(self) -> bool:
        """Whether the running call was revoked, and a signal that comes now is to end it."""
        return self.running != 0 and load32(&self.shared.terminated) == self.running

    # --- records out

    cdef int ring_bell(self) noexcept:
        """Wake the main process unless a doorbell is on its way already."""
        cdef ssize_t sent
        if self.unrung == 0:
            return 0
        self.unrung = 0
        if exchange32(&self.shared.rung, 1) == 0:
            sent = c_send(self.sock, b"!", 1, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0 and errno != EAGAIN and errno != EINTR:
                self.stopped = True     # the main process has gone; the socket's end says so too
        return 0

    cdef Py_ssize_t room(self) noexcept:
        return RING_BYTES - <Py_ssize_t> (self.shared.head - load64(&self.shared.tail))

    cdef int append(self, const void *data, Py_ssize_t size) noexcept:
        """Commit bytes for which there is room."""
        cdef uint64_t head = self.shared.head
        cdef Py_ssize_t place = head & (RING_BYTES - 1)
        cdef Py_ssize_t first = size if place + size <= RING_BYTES else RING_BYTES - place
        memcpy(self.ring + place, data, first)
        memcpy(self.ring, <const uint8_t *> data + first, size - first)
        store64(&self.shared.head, head + size)
        return 0

    cdef int write(self, const void *data, Py_ssize_t size) except -1:
        """Append one record, whole or not at all, whatever signal or thread comes between."""
        if self.in_parts or self.room() < size:
            return self.write_when_free(data, size)
        return self.append(data, size)

    cdef int write_when_free(self, const void *data, Py_ssize_t size) except -1:
        """Wait for room and append. Handlers of signals run, and may raise, only while nothing of the record is committed.

        What the other side puts together from parts, it begins as soon as it has the size; all else needs room for the whole.
        """
        cdef bint is_large = size > RING_BYTES // 2
        cdef Py_ssize_t part
        while self.in_parts or self.room() < (<Py_ssize_t> sizeof(uint32_t) if is_large else size):
            self.pause()
            PyErr_CheckSignals()
        if not is_large:
            return self.append(data, size)
        self.in_parts = True
        while size:
            part = min(size, self.room())
            if part == 0:
                self.pause()
                continue
            self.append(data, part)
            data = <const uint8_t *> data + part
            size -= part
        self.in_parts = False
        return 0

    cdef int pause(self) noexcept:
        """Have the main process read, and give it and other threads of this one time."""
        cdef timespec pause
        self.unrung = 1
        self.ring_bell()
        pause.tv_sec, pause.tv_nsec = 0, 50000
        with nogil:
            nanosleep(&pause, NULL)
        return 0

    cdef int check_size(self, Py_ssize_t size) except -1:
        if size > MAX_RECORD:
            raise EncodeError(f"{size} bytes are too much to hand to the main process, which takes {MAX_RECORD}")
        return 0

    cdef int noted(self, bint urgent) except -1:
        if self.unrung == 0:
            self.unrung_since = monotonic_ns()
        self.unrung += 1
        if urgent or self.unrung >= BELL_AFTER:
            self.ring_bell()
        return 0

    cdef uint32_t owner_seq(self) except? 0:
        """The number of the call for which this code runs, 0 for none."""
        cdef Call call
        if self.owner is None:
            return self.running
        call = self.owner()
        return 0 if call is None else call.seq

    def finish(self, Call call, int state, bytes meta=None, str reason=None, int flags=0) -> None:
        """Report how a call ended. ``meta`` is the encoded result to store, None to store nothing."""
        cdef OutcomeRecord record
        cdef Py_ssize_t reason_size = 0
        cdef const char *reason_text = NULL
        cdef uint8_t small[2048]
        cdef bytes large
        cdef uint8_t *p
        cdef Py_ssize_t meta_size = 0 if meta is None else PyBytes_GET_SIZE(meta)
        if call.answered and self.slots > 1:
            return      # it was cancelled: the main process has no such call any more
        if reason is not None:
            reason_text = PyUnicode_AsUTF8AndSize(reason, &reason_size)
        self.check_size(sizeof(OutcomeRecord) + meta_size + reason_size)
        record.size = <uint32_t> (sizeof(OutcomeRecord) + meta_size + reason_size)
        record.kind = RECORD_OUTCOME
        record.state = <uint8_t> state
        record.flags = <uint16_t> flags
        record.seq = call.seq
        record.meta_size = <uint32_t> meta_size
        record.runtime_ns = monotonic_ns() - call.started_ns
        if record.size <= sizeof(small):
            p = small
        else:
            large = PyBytes_FromStringAndSize(NULL, record.size)
            p = <uint8_t *> PyBytes_AS_STRING(large)
        memcpy(p, &record, sizeof(OutcomeRecord))
        if meta_size:
            memcpy(p + sizeof(OutcomeRecord), PyBytes_AS_STRING(meta), meta_size)
        if reason_size:
            memcpy(p + sizeof(OutcomeRecord) + meta_size, reason_text, reason_size)
        self.write(p, record.size)
        call.answered = True
        self.noted(False)

    def cancelled(self, Call call) -> None:
        """Report that a call has ended which was told to: the main process records what became of it."""
        self.finish(call, OUTCOME_IGNORED)

    def fileno(self) -> int:
        """Return the descriptor that is readable when calls have come."""
        return self.sock

    def has_answered(self, Call call) -> bool:
        """Whether this call's end has been reported."""
        return call.answered

    def publish(self, Message message) -> None:
        """Hand a message to the main process; it is confirmed before the running call is settled."""
        cdef PublishRecord record
        cdef Py_ssize_t exchange_size, routing_key_size
        cdef const char *exchange = PyUnicode_AsUTF8AndSize(message.exchange, &exchange_size)
        cdef const char *routing_key = PyUnicode_AsUTF8AndSize(message.routing_key, &routing_key_size)
        cdef bytes whole
        cdef uint8_t *p
        if exchange_size > 255 or routing_key_size > 255:
            raise EncodeError("an exchange name or routing key is longer than 255 bytes")
        if PyBytes_GET_SIZE(message.props) > MAX_PROPS:
            raise EncodeError(
                f"message headers take {PyBytes_GET_SIZE(message.props)} bytes, at most {MAX_PROPS} fit an AMQP frame: "
                "send less in headers")
        self.check_size(sizeof(PublishRecord) + exchange_size + routing_key_size + PyBytes_GET_SIZE(message.props)
                        + PyBytes_GET_SIZE(message.body))
        record.kind = RECORD_PUBLISH
        record.pad = 0
        record.pad2 = 0
        record.seq = self.owner_seq()
        record.exchange_size = <uint16_t> exchange_size
        record.routing_key_size = <uint16_t> routing_key_size
        record.props_size = <uint32_t> PyBytes_GET_SIZE(message.props)
        record.body_size = <uint32_t> PyBytes_GET_SIZE(message.body)
        record.size = sizeof(PublishRecord) + record.exchange_size + record.routing_key_size + record.props_size + record.body_size
        whole = PyBytes_FromStringAndSize(NULL, record.size)
        p = <uint8_t *> PyBytes_AS_STRING(whole)
        memcpy(p, &record, sizeof(PublishRecord))
        p += sizeof(PublishRecord)
        memcpy(p, exchange, exchange_size)
        memcpy(p + exchange_size, routing_key, routing_key_size)
        p += exchange_size + routing_key_size
        memcpy(p, PyBytes_AS_STRING(message.props), record.props_size)
        memcpy(p + record.props_size, PyBytes_AS_STRING(message.body), record.body_size)
        self.write(PyBytes_AS_STRING(whole), record.size)
        self.noted(True)

    def state(self, str task_id, str state, bytes meta) -> None:
        """Hand an intermediate state to the main process to be stored."""
        cdef StateRecord record
        cdef bytes id_bytes = task_id.encode("utf-8", "surrogatepass"), state_bytes = state.encode()
        self.check_size(sizeof(StateRecord) + len(id_bytes) + len(state_bytes) + len(meta))
        record.kind = RECORD_STATE
        record.seq = self.owner_seq()
        record.id_size = <uint16_t> len(id_bytes)
        record.state_size = <uint8_t> len(state_bytes)
        record.meta_size = <uint32_t> len(meta)
        if len(id_bytes) > 65535 or len(state_bytes) > 255:
            raise LocalProtocolError(f"task id or state name is too long: {task_id[:60]!r}, {state[:60]!r}")
        record.size = <uint32_t> (sizeof(StateRecord) + len(id_bytes) + len(state_bytes) + len(meta))
        whole = PyBytes_FromStringAndSize(<const char *> &record, sizeof(StateRecord)) + id_bytes + state_bytes + meta
        self.write(PyBytes_AS_STRING(whole), len(whole))
        self.noted(True)

    def ready(self) -> None:
        """Tell the main process that this child takes calls."""
        cdef OutcomeRecord record
        record.size = sizeof(OutcomeRecord)
        record.kind = RECORD_READY
        record.seq = 0
        record.meta_size = 0
        self.write(&record, sizeof(OutcomeRecord))
        self.noted(True)


cdef bint is_plain_json(const uint8_t *props, Py_ssize_t size) noexcept nogil:
    """Whether the properties begin with content type application/json and encoding utf-8, as nearly all do."""
    return (size > 26 and props[0] & 0xE0 == 0xE0 and props[2] == 16 and memcmp(props + 3, b"application/json", 16) == 0
            and props[19] == 5 and memcmp(props + 20, b"utf-8", 5) == 0)


def call_record(int seq, str exchange, str routing_key, bytes props, bytes body, *, double time_limit=0, double soft_time_limit=0,
                bint wants_result=False, bint redelivered=False, int deliveries=1, bint is_own=False) -> bytes:
    """Return a CALL record (for tests and benchmarks; the loop writes its own in place)."""
    cdef CallRecord record
    cdef bytes tail = exchange.encode() + routing_key.encode() + props + body
    record.size = <uint32_t> (sizeof(CallRecord) + len(tail))
    record.kind = RECORD_CALL
    record.redelivered = redelivered
    record.wants_result = wants_result
    record.wants_report = False
    record.is_own = is_own
    record.seq = seq
    record.deliveries = deliveries
    record.time_limit, record.soft_time_limit = time_limit, soft_time_limit
    record.exchange_size, record.routing_key_size = <uint16_t> len(exchange.encode()), <uint16_t> len(routing_key.encode())
    record.props_size, record.body_size = <uint32_t> len(props), <uint32_t> len(body)
    return PyBytes_FromStringAndSize(<const char *> &record, sizeof(CallRecord)) + tail
