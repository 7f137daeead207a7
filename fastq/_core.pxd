"""The message loop: declarations. One Core per worker."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq._child cimport Child, ManyChild, TaskRules
from fastq._ledger cimport Ledger
from fastq._waiting cimport WaitingLine
from fastq.link cimport BatchSource, Delivery, Source
from fastq.wire.message cimport Message


cdef class Core(Ledger):
    cdef TaskRules last_task
    cdef object revoked_ids                 # container of ids that must not run; None: nothing is revoked
    cdef Source outlet                      # publishes follow-ups and rpc results; None while disconnected
    cdef BatchSource store                  # keeps results; None: nowhere, or by rpc
    cdef readonly bint rpc_results
    cdef list backlog                       # messages waiting for an outlet
    cdef public Py_ssize_t max_etas         # messages that wait here for their time, as long as there is another place
    cdef TaskRules own_task               # of calls that the main process makes, and no message asked for
    cdef readonly object hooks              # what calls do is told them, what children do the pool
    cdef readonly object pool
    cdef public object on_idle
    cdef object loop
    cdef object timer
    cdef double timer_at
    cdef bint on_hold                       # nothing is handed to children: the worker is about to stop, or not yet ready
    cdef readonly bint stopping
    cdef readonly bint reliable
    cdef readonly int max_deliveries
    cdef readonly int max_child_deaths
    cdef readonly uint64_t max_tasks_per_child
    cdef readonly double time_limit
    cdef readonly double soft_time_limit
    cdef readonly double grace              # how long calls have to end whose process has left one behind, 0: no bound
    cdef public bint wants_received         # the hooks hear of every delivery
    cdef public bint wants_outcomes         # the hooks hear of every start and end
    cdef public bint reads_foreign          # a message without our headers may be in an older form
    cdef public bint answers_all            # replies (rpc) to senders that gave no address, too
    cdef readonly double run_ns             # moving average over all tasks
    cdef bint looping
    cdef list are_many                      # for each group: whether its children run several calls at a time

    cdef int release(self, Delivery delivery) except -1
    cdef int lost(self, Delivery delivery, Child child, str reason) except -1
    cdef bint wants_result(self, Delivery delivery) except -1
    cdef double limit_of(self, Delivery delivery) except -1
    cdef double soft_limit_of(self, Delivery delivery) except -1
    cdef bint has_limit(self, Child child) except -1
    cdef str reply_to(self, Delivery delivery)
    cdef int refuse(self, Delivery delivery, str reason, str detail) except -1
    cdef int fail(self, Delivery delivery, str kind, object detail, int verdict) except -1
    cdef int admit(self, Delivery delivery) except -1
    cdef int go_on(self, Delivery delivery) except -1
    cdef int on_own_call(self, Delivery delivery) except -1
    cdef int hand(self, Delivery delivery) except -1
    cdef int give_back_handed(self) except -1
    cdef bint postpone(self, Delivery delivery) except -1
    cdef int tell(self, Delivery delivery, int verdict) except -1
    cdef bint is_revoked(self, Delivery delivery) except -1
    cdef bint runs_already(self, Delivery delivery) except -1
    cdef double turn_of(self, Delivery delivery, double now) except -1
    cdef bint read_foreign(self, Delivery delivery) except -1
    cdef Child pick(self, TaskRules task)
    cdef Child pick_among_many(self, Delivery delivery)
    cdef int dispatch_line(self, WaitingLine line) except -1
    cdef int last_death(self) noexcept
    cdef bint is_spared(self, Delivery delivery, ManyChild child) except -1
    cdef int end_cancelled(self, Delivery delivery, str kind, object detail) except -1
    cdef int check_many(self, ManyChild child) except -1
    cdef int give_up(self, ManyChild child, Delivery delivery) except -1
    cdef int sacrifice(self, ManyChild child, str why) except -1
    cdef int check_turns(self, ManyChild child, int64_t now) except -1
    cdef bint end_running(self, Child child, Delivery running, int signum) except -1
    cdef int hand_over(self, Child child, Delivery delivery) except -1
    cdef int dispatch(self) except -1
    cdef int started(self, Delivery delivery, int pid) except -1
    cdef int collect(self, Child child) except -1
    cdef int on_outcome(self, Child child, const uint8_t *record, Py_ssize_t size) except -1
    cdef int on_publish(self, Child child, const uint8_t *record, Py_ssize_t size) except -1
    cdef int on_state(self, Child child, const uint8_t *record, Py_ssize_t size) except -1
    cdef int save(self, Delivery delivery, str state, bytes meta, bint final) except -1
    cdef int reply(self, Delivery delivery, bytes props, bytes meta, bint final) except -1
    cdef int publish(self, Message message, Delivery owner) except -1
    cdef int conclude(self, Delivery delivery) except -1
    cdef int settle(self, Delivery delivery, int verdict) except -1
    cdef int check_children(self) except -1
    cdef int take_back(self, Child child) except -1
    cdef int wake_etas(self) except -1
    cdef int flush(self, bint now) except -1
    cdef int arm(self) except -1
