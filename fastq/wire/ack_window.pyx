# cython: language_level=3
"""Which delivery tags can be acknowledged with one ``multiple`` ack. No sockets.

Tags of a channel count up from 1. ``multiple`` covers every tag up to the one named, so it may only be sent over a
prefix in which each tag is finished. A tag that was rejected on its own is finished too.
"""

from libc.stdlib cimport calloc, free

from fastq.errors import RemoteProtocolError

cdef enum:
    OPEN = 1        # with the worker
    OWED = 2        # finished, its ack not sent yet
    GONE = 3        # rejected or acknowledged on its own: the broker does not know the tag any more


cdef class AckWindow:
    def __cinit__(self):
        self.capacity = 1024
        self.state = <uint8_t *> calloc(self.capacity, 1)
        if self.state == NULL:
            raise MemoryError()
        self.base = 1
        self.end = 1
        self.acked_prefix = 0
        self.sent_prefix = 0

    def __dealloc__(self):
        free(self.state)

    cdef int received(self, uint64_t tag) except -1:
        """Take note of a delivery. Tags come in order without gaps; anything else is the broker's mistake."""
        cdef uint8_t *larger
        cdef uint64_t i
        if tag != self.end:
            raise RemoteProtocolError(f"delivery tag {tag} follows {self.end - 1}")
        if <Py_ssize_t> (tag - self.base) >= self.capacity:
            larger = <uint8_t *> calloc(self.capacity * 2, 1)
            if larger == NULL:
                raise MemoryError()
            for i in range(self.base, self.end):
                larger[i & <uint64_t> (self.capacity * 2 - 1)] = self.state[i & <uint64_t> (self.capacity - 1)]
            free(self.state)
            self.state = larger
            self.capacity *= 2
        self.state[tag & <uint64_t> (self.capacity - 1)] = OPEN
        self.end = tag + 1
        return 0

    cdef int settled(self, uint64_t tag, bint by_ack) except -1:
        """A delivery is finished: its ack is owed (``by_ack``), or the broker was told on its own."""
        cdef uint64_t mask = <uint64_t> (self.capacity - 1)
        if tag < self.base or tag >= self.end:
            return 0
        self.state[tag & mask] = OWED if by_ack else GONE
        while self.base < self.end and self.state[self.base & mask] != OPEN:
            # The tag that a multiple ack names must still be known to the broker.
            if self.state[self.base & mask] == OWED:
                self.acked_prefix = self.base
            self.base += 1
        return 0

    cdef uint64_t take_prefix(self) noexcept:
        """Return the tag for a multiple ack, 0 when nothing new is contiguous."""
        if self.acked_prefix <= self.sent_prefix:
            return 0
        self.sent_prefix = self.acked_prefix
        return self.acked_prefix

    cdef bint is_covered(self, uint64_t tag) noexcept:
        """Whether the last prefix taken covers the tag."""
        return tag <= self.sent_prefix

    cdef bint is_idle(self) noexcept:
        """Whether nothing that was received is unsettled."""
        return self.base == self.end
