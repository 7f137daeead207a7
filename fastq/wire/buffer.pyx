# cython: language_level=3
"""The growable byte buffer declared in buffer.pxd. No protocol knowledge."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport free, realloc


cdef class Writer:
    def __cinit__(self):
        self.data = NULL
        self.size = 0
        self.capacity = 0

    def __dealloc__(self):
        free(self.data)

    cdef int grow(self, Py_ssize_t extra) except -1:
        cdef Py_ssize_t wanted = self.capacity * 2
        cdef uint8_t *larger
        if wanted < self.size + extra:
            wanted = self.size + extra
        if wanted < 1024:
            wanted = 1024
        larger = <uint8_t *> realloc(self.data, wanted)
        if larger == NULL:
            raise MemoryError()
        self.data = larger
        self.capacity = wanted
        return 0

    cdef bytes take(self):
        """Return what was written and start again."""
        cdef bytes out = PyBytes_FromStringAndSize(<char *> self.data, self.size)
        self.clear()
        return out

    cdef void clear(self) noexcept:
        """Start again, keeping the memory unless it has become large."""
        self.size = 0
        if self.capacity > 1 << 20:
            free(self.data)
            self.data = NULL
            self.capacity = 0
