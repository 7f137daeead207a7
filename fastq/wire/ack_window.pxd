"""Which delivery tags can be acknowledged with one ``multiple`` ack: declarations."""

from libc.stdint cimport uint8_t, uint64_t


cdef class AckWindow:
    cdef uint8_t *state           # one byte per tag, from `base`; a ring of `capacity` (a power of two)
    cdef Py_ssize_t capacity
    cdef uint64_t base            # the lowest tag that is not settled yet
    cdef uint64_t end             # one past the highest tag received
    cdef readonly uint64_t acked_prefix    # tags up to here may be acknowledged by one multiple ack; 0 = nothing new
    cdef uint64_t sent_prefix

    cdef int received(self, uint64_t tag) except -1
    cdef int settled(self, uint64_t tag, bint by_ack) except -1
    cdef uint64_t take_prefix(self) noexcept
    cdef bint is_covered(self, uint64_t tag) noexcept
    cdef bint is_idle(self) noexcept
