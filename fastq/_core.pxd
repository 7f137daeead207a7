"""The message loop: declarations. One Core per worker; a Child per process it feeds."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq.link cimport BatchSource, Delivery, Sink, Source
from fastq.wire.buffer cimport Writer
from fastq.wire.message cimport Message
from fastq.wire.pipe cimport RingReader


cdef enum:
    SENT_SLOTS = 256            # calls a child may hold; a power of two above MAX_ADVANCE
    MAX_ADVANCE = 128


cdef class TaskOptions:
    cdef readonly str name
    cdef bytes key
    cdef readonly bint acks_late
    cdef readonly bint ignore_result
    cdef readonly bint requeue_lost         # run again when the child died
    cdef readonly double time_limit         # 0 = none
    cdef readonly double soft_time_limit
    cdef readonly double run_ns             # moving average of the run time; -1 before the first run
    cdef readonly uint64_t runs
    cdef int note_run(self, double ns) except -1


cdef class Child:
    cdef Core core
    cdef RingReader reader
    cdef object transport
    cdef object write_bytes
    cdef bytearray bell
    cdef object bell_view
    cdef Writer out
    cdef list sent                          # deliveries by sequence number modulo SENT_SLOTS
    cdef uint32_t first                     # oldest call not answered
    cdef uint32_t next                      # sequence number of the next call
    cdef double expected_ns                 # run time of what it holds, by the averages
    cdef uint64_t given
    cdef readonly int slot
    cdef readonly int pid
    cdef readonly bint accepting
    cdef bint is_waking                     # was idle, and is given its first calls in this batch
    cdef readonly bint limited              # some calls were taken back: nothing new until they are answered
    cdef readonly bint retiring
    cdef readonly bint gone
    cdef readonly double killed_for         # the hard limit it was killed for, 0 = none
    cdef uint32_t killed_seq                # the call that ran past it
    cdef bint answered                      # what it says from here on comes too late
    cdef int write_call(self, Delivery delivery, bint wants_result) except -1
    cdef int flush(self) except -1
    cdef Delivery running(self)
    cdef uint32_t outstanding(self) noexcept


cdef class Core(Sink):
    cdef dict tasks
    cdef TaskOptions last_task
    cdef readonly list children
    cdef list sources
    cdef Source outlet                      # publishes follow-ups and rpc results; None while disconnected
    cdef BatchSource store                  # keeps results; None: nowhere, or by rpc
    cdef readonly bint rpc_results
    cdef list backlog                       # messages waiting for an outlet
    cdef Delivery waiting_first
    cdef Delivery waiting_last
    cdef readonly Py_ssize_t waiting
    cdef list etas                          # heap of (due, order, delivery)
    cdef uint64_t eta_order
    cdef readonly list ledger               # how many deliveries are in each state
    cdef readonly object hooks
    cdef public object on_idle
    cdef object loop
    cdef object timer
    cdef double timer_at
    cdef readonly bint stopping
    cdef readonly bint reliable
    cdef readonly int max_deliveries
    cdef readonly int max_child_deaths
    cdef readonly uint64_t max_tasks_per_child
    cdef readonly double time_limit
    cdef readonly double soft_time_limit
    cdef public bint log_received
    cdef readonly double run_ns             # moving average over all tasks
    cdef readonly uint64_t received, done
    cdef readonly dict refused
    cdef readonly list outcomes
    cdef bint looping

    cdef int release(self, Delivery delivery) except -1
    cdef int lost(self, Delivery delivery, Child child, str reason) except -1
    cdef bint wants_result(self, Delivery delivery) except -1
    cdef double limit_of(self, Delivery delivery) except -1
    cdef bint has_limit(self, Child child) except -1
    cdef str reply_to(self, Delivery delivery)
    cdef Py_ssize_t unsettled(self) except -1
    cdef int refuse(self, Delivery delivery, str reason) except -1
    cdef int fail(self, Delivery delivery, str kind, object detail, int verdict) except -1
    cdef int enqueue(self, Delivery delivery) except -1
    cdef int enqueue_first(self, Delivery delivery) except -1
    cdef Child pick(self, TaskOptions task)
    cdef int hand_over(self, Child child, Delivery delivery) except -1
    cdef int dispatch(self) except -1
    cdef int started(self, Child child) except -1
    cdef int collect(self, Child child) except -1
    cdef int on_outcome(self, Child child, const uint8_t *record, Py_ssize_t size) except -1
    cdef int on_publish(self, Child child, const uint8_t *record, Py_ssize_t size) except -1
    cdef int on_state(self, Child child, const uint8_t *record, Py_ssize_t size) except -1
    cdef int save(self, Delivery delivery, str state, bytes meta, bint final) except -1
    cdef int publish(self, Message message, Delivery owner) except -1
    cdef int conclude(self, Delivery delivery) except -1
    cdef int settle(self, Delivery delivery, int verdict) except -1
    cdef int move(self, Delivery delivery, int state) except -1
    cdef int check_children(self) except -1
    cdef int take_back(self, Child child) except -1
    cdef int wake_etas(self) except -1
    cdef int flush(self, bint now) except -1
    cdef int arm(self) except -1
