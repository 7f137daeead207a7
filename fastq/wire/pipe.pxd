"""The channel between the worker's main process and one child: declarations of records and shared memory.

Main process to child: CALL, SLOT, CANCEL and STOP records over a stream socket. Child to main process: records in a ring of shared
memory, so that a finished call is visible at once, and survives the death of its child. All integers in host order: both ends are
one program.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq.wire.call cimport Call


cdef enum:
    RING_BYTES = 1 << 18
    PAGE_BYTES = 4096
    SHARED_BYTES = PAGE_BYTES + RING_BYTES
    MAX_RECORD = 1 << 30


cdef enum RecordKind:
    RECORD_CALL = 1
    RECORD_STOP = 2
    RECORD_OUTCOME = 3
    RECORD_PUBLISH = 4
    RECORD_STATE = 5
    RECORD_READY = 6
    RECORD_SLOT = 7
    RECORD_CANCEL = 8           # end one of several calls that run; its number is in `seq`


# How a call ended; the order is that of OUTCOME_NAMES in pipe.pyx.
cpdef enum:
    OUTCOME_SUCCESS = 0
    OUTCOME_FAILURE = 1
    OUTCOME_RETRY = 2
    OUTCOME_IGNORED = 3
    OUTCOME_REJECTED = 4        # the task raised Reject
    OUTCOME_REQUEUE = 5         # the task raised Reject(requeue=True)
    OUTCOME_MALFORMED = 6       # the message itself is wrong: reject, count, store nothing
    OUTCOME_RETURNED = 7        # not started: the main process has taken it back
    OUTCOME_UNKNOWN = 8         # no such task in the child: FAILURE is stored, the message rejected


cpdef enum:
    FLAG_RECYCLE = 1            # the child wants to be replaced (memory)
    FLAG_FOR_HOOKS = 2          # what the outcome brings is for the main process's hooks, not for the result store


cdef packed struct CallRecord:
    uint32_t size
    uint8_t kind
    uint8_t redelivered
    uint8_t wants_result
    uint8_t wants_report        # the outcome's reason is to tell monitors how it ended
    uint32_t seq                # of a SLOT record: the slot
    uint32_t deliveries
    double time_limit
    double soft_time_limit
    uint16_t exchange_size
    uint16_t routing_key_size
    uint32_t props_size
    uint32_t body_size
    uint8_t is_own              # made by the main process itself


cdef packed struct OutcomeRecord:
    uint32_t size
    uint8_t kind
    uint8_t state
    uint16_t flags
    uint32_t seq
    uint32_t meta_size          # the encoded result; the rest of the record is the reason, as text
    int64_t runtime_ns


cdef packed struct PublishRecord:
    uint32_t size
    uint8_t kind
    uint8_t pad
    uint16_t exchange_size
    uint32_t seq
    uint16_t routing_key_size
    uint16_t pad2
    uint32_t props_size
    uint32_t body_size


cdef packed struct StateRecord:
    uint32_t size
    uint8_t kind
    uint8_t state_size
    uint16_t id_size
    uint32_t seq
    uint32_t meta_size


# One page before the ring. Each field has one writer; fields of different writers are on different cache lines.
cdef struct Shared:
    uint64_t head               # bytes written to the ring, by the child
    int64_t started_ns          # monotonic start of call `started`; of several at a time: their loop's last turn; by the child
    uint32_t started            # sequence number of the call started last, by the child: all before it have started
    uint8_t pad1[44]
    uint64_t tail               # bytes read from the ring, by the main process
    uint8_t pad2[56]
    uint32_t limit              # calls after this one must not start, by the main process
    uint32_t terminated         # the call that a signal is to end, by the main process
    uint8_t pad3[56]
    uint32_t rung               # a doorbell byte is on its way, by both (atomic exchange)
    uint8_t pad4[60]


# Where a child runs several calls at a time, behind the ring: when each was started (int64_t), by its place, by the child.
cdef Py_ssize_t places_of(Py_ssize_t slots) noexcept nogil
cdef Py_ssize_t size_for(Py_ssize_t slots) noexcept nogil

cdef int64_t monotonic_ns() noexcept nogil

cdef extern from *:
    """
    #define fastq_load(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define fastq_store(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define fastq_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
    """
    uint32_t load32 "fastq_load"(uint32_t *p) noexcept nogil
    uint64_t load64 "fastq_load"(uint64_t *p) noexcept nogil
    int64_t load64s "fastq_load"(int64_t *p) noexcept nogil
    void store32 "fastq_store"(uint32_t *p, uint32_t value) noexcept nogil
    void store64 "fastq_store"(uint64_t *p, uint64_t value) noexcept nogil
    void store64s "fastq_store"(int64_t *p, int64_t value) noexcept nogil
    uint32_t exchange32 "fastq_exchange"(uint32_t *p, uint32_t value) noexcept nogil


cdef class RingReader:
    """The main process's end of the shared memory."""
    cdef int fd
    cdef Py_ssize_t size
    cdef Shared *shared
    cdef uint8_t *ring
    cdef int64_t *starts        # NULL: one call at a time
    cdef uint8_t *scratch
    cdef bytes assembling       # a record larger than half the ring, as it arrives
    cdef Py_ssize_t assembled

    cdef const uint8_t *next(self, Py_ssize_t *size) except? NULL
    cdef int consumed(self, Py_ssize_t size) except -1
    cdef int copy_out(self, void *target, uint64_t at, Py_ssize_t size) noexcept


cdef class ChildPipe:
    """The child's end: calls in, records out."""
    cdef int sock
    cdef readonly int slots     # calls that may run at a time
    cdef Shared *shared
    cdef uint8_t *ring
    cdef int64_t *starts        # NULL: one call at a time
    cdef uint8_t *buffer
    cdef Py_ssize_t start, end, capacity
    cdef int unrung
    cdef int64_t unrung_since
    cdef bint in_parts          # some thread has committed a part of a record
    cdef uint32_t running       # the call that runs; of several at a time: none
    cdef str last_exchange, last_routing_key
    cdef readonly bint stopped  # no more calls come
    cdef readonly bint closed   # nothing comes any more
    cdef public object on_slot  # called with the slot that this child was put into, unless it was born with that number
    cdef public object on_cancel    # called with the number of a call that is to end, and the signal
    cdef public object owner    # of several at a time: returns the Call for which this code runs, or None

    cdef int fill(self, bint waits) except -1
    cdef bint has_record(self) noexcept
    cdef uint32_t owner_seq(self) except? 0
    cdef int take_control(self, const uint8_t *record) except -1
    cdef Call parse(self, const uint8_t *record)
    cdef Py_ssize_t room(self) noexcept
    cdef int append(self, const void *data, Py_ssize_t size) noexcept
    cdef int write(self, const void *data, Py_ssize_t size) except -1
    cdef int write_when_free(self, const void *data, Py_ssize_t size) except -1
    cdef int pause(self) noexcept
    cdef int ring_bell(self) noexcept
    cdef int check_size(self, Py_ssize_t size) except -1
    cdef int noted(self, bint urgent) except -1
