"""What is here and in which state: declarations."""

from libc.stdint cimport uint64_t

from fastq._child cimport Keeper
from fastq._waiting cimport Later, WaitingLine
from fastq.link cimport Delivery


cdef class Ledger(Keeper):
    """Every delivery, child and source of a worker, and how many deliveries are in which state. Decides nothing."""
    cdef readonly dict tasks                # TaskRules by encoded name
    cdef readonly list children
    cdef list sources
    cdef list lines                         # WaitingLines for a child, one for each group of children
    cdef Later later                        # for their time
    cdef set handed                         # deliveries that the hooks have taken and not judged
    cdef public Py_ssize_t parked           # how many of those that the hooks have wait for their time
    cdef readonly list ledger               # how many deliveries are in each state
    cdef readonly list outcomes             # how many calls have ended in each way
    cdef readonly dict refused              # how many messages, by class
    cdef readonly uint64_t received, done, postponed
    cdef readonly uint64_t stalls           # how many times an event loop of a child took no turn for long

    cdef int move(self, Delivery delivery, int state) except -1
    cdef Py_ssize_t unsettled(self) except -1
    cdef WaitingLine line_of(self, Delivery delivery)
    cdef Py_ssize_t in_line(self) except -1
