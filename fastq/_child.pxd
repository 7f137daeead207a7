"""The processes of the pool, and what is known of tasks: declarations."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq.link cimport Delivery, Sink
from fastq.wire.buffer cimport Writer
from fastq.wire.pipe cimport RingReader


cdef enum:
    SENT_SLOTS = 256            # calls a child may hold; a power of two above MAX_ADVANCE
    MAX_ADVANCE = 128


cdef class TaskRules:
    cdef readonly str name
    cdef bytes key
    cdef readonly bint acks_late
    cdef readonly bint ignore_result
    cdef readonly bint requeue_lost         # run again when the child died
    cdef readonly bint reject_failed        # late acknowledgement: a failure goes to the dead letters
    cdef readonly bint handed_over          # the hooks take its messages as they come
    cdef readonly bint handed_in_turn       # the hooks take its messages when their time and turn have come
    cdef public int group                   # of the children that run its calls
    cdef public double time_limit           # 0 = none
    cdef public double soft_time_limit
    cdef public double rate_limit           # calls a second, 0 = no limit
    cdef double next_turn                   # unix time from which the rate limit allows another call
    cdef readonly double run_ns             # moving average of the run time; -1 before the first run
    cdef readonly uint64_t runs
    cdef int note_run(self, double ns) except -1


cdef class Child


cdef class Keeper(Sink):
    """Who keeps children: the message loop."""
    cdef int on_bell(self, Child child) except -1      # the child has written records


cdef class Child:
    cdef Keeper keeper
    cdef RingReader reader
    cdef object transport
    cdef object write_bytes
    cdef bytearray bell
    cdef object bell_view
    cdef Writer out
    cdef list sent                          # deliveries by the last bits of their numbers
    cdef uint32_t mask                      # those bits
    cdef uint32_t first                     # oldest call not answered, where they are answered in order
    cdef uint32_t next                      # sequence number of the next call
    cdef readonly int slots                 # calls that it runs at a time
    cdef readonly int group                 # of calls that it takes
    cdef double expected_ns                 # run time of what it holds, by the averages
    cdef uint64_t given
    cdef readonly int slot                  # until it takes calls: the number that it was born with
    cdef readonly int pid
    cdef readonly bint accepting
    cdef int64_t woken_ns                   # when it was given a call while it was idle
    cdef readonly bint limited              # some calls were taken back: nothing new until they are answered
    cdef readonly bint retiring
    cdef readonly bint gone
    cdef readonly double killed_for         # the hard limit it was killed for, 0 = none
    cdef readonly int terminated_by         # the signal that a revoke has sent to its call, 0 = none
    cdef uint32_t killed_seq                # the call that ran past it
    cdef bint answered                      # what it says from here on comes too late
    cdef int write_call(self, Delivery delivery, bint wants_result, bint wants_report, double time_limit,
                        double soft_time_limit) except -1
    cdef int write_control(self, uint8_t kind, uint32_t seq, int number=*) except -1
    cdef int flush(self) except -1
    cdef Delivery call_of(self, uint32_t seq)
    cdef Delivery answer(self, uint32_t seq)
    cdef list held(self)
    cdef list running(self)
    cdef list take_unstarted(self, uint32_t started)
    cdef bint has_free_place(self) noexcept
    cdef int64_t started_at(self, uint32_t seq) noexcept
    cdef uint32_t outstanding(self) noexcept


cdef class ManyChild(Child):
    """A child that runs several calls at a time, which end in any order."""
    cdef uint32_t count                     # calls not answered
    cdef uint32_t most                      # calls that it may have
    cdef set taken                          # numbers of calls that were taken back and are to be answered yet
    cdef set left                           # numbers of calls that were left behind
    cdef int64_t left_since_ns              # when the first of those was left behind
    cdef dict limits                        # the hard limits of calls that have one, by number
    cdef dict cancelled                     # calls that were told to end, by number: (kind, detail, monotonic time)
    cdef readonly bint gives_up             # a call that does not end when it is told to is left behind; else the process is killed
    cdef bint is_stuck                      # it is killed as its loop stands still, and nobody knows for which call
    cdef readonly bint sacrificed           # it is killed for the sake of one call: the others run again, uncounted
    cdef bint alone                         # it runs one call, which may be what has killed children
    cdef int64_t unstarted_since_ns         # when it was first seen not to take what it was given
    cdef bint is_stalled
    cdef int64_t stall_ns                   # how long its loop may stand still; 0: there is none
    cdef int64_t busy_since_ns              # when it was given a call while it had none
    cdef int cancel(self, Delivery delivery, str kind, object detail, int signum) except -1
    cdef int give_up(self, Delivery delivery) except -1


cdef str delivery_id(Delivery delivery)
cdef str delivery_task(Delivery delivery)
