"""Two places where deliveries wait in the main process: the line for a child, and the heap of what is later. Declarations."""

from libc.stdint cimport uint64_t

from fastq.link cimport Delivery, Source


cdef class WaitingLine:
    """Deliveries that wait for a child, oldest first: a linked list, so that nothing is moved or allocated."""
    cdef Delivery first
    cdef Delivery last
    cdef Py_ssize_t count

    cdef int join(self, Delivery delivery) except -1
    cdef int join_first(self, Delivery delivery) except -1
    cdef int leave(self) except -1
    cdef list clear(self)
    cdef list drop(self, Source source)
    cdef list all(self)


cdef class Later:
    """Deliveries that wait for their time, or their turn under a rate limit, soonest first."""
    cdef list heap                          # of (due, order, delivery)
    cdef uint64_t order                     # how many have been put here so far

    cdef int put(self, Delivery delivery, double due) except -1
    cdef double first_due(self) except? -1
    cdef Delivery take_due(self, double now)
    cdef list clear(self)
    cdef list drop(self, Source source)
    cdef list entries(self)
    cdef Py_ssize_t since(self, uint64_t order) except -1
