"""Dates as text: declarations."""

from libc.stdint cimport int64_t, uint8_t

cdef int64_t LAST_SECOND

cdef double read_clock() noexcept nogil
cdef double parse_iso8601(const uint8_t *text, Py_ssize_t size) noexcept nogil
cdef bytes format_iso8601(double unix)
cdef Py_ssize_t count_digits(const uint8_t *p, Py_ssize_t size) noexcept nogil
cdef double read_fraction(const uint8_t *p, Py_ssize_t size, Py_ssize_t *at) noexcept nogil
