"""A call in the child: declarations."""

from libc.stdint cimport int64_t, uint32_t


cdef class Call:
    cdef readonly bytes props
    cdef readonly bytes body
    cdef readonly str exchange
    cdef readonly str routing_key
    cdef readonly str name
    cdef readonly str id
    cdef readonly int retries
    cdef readonly int deliveries
    cdef readonly bint redelivered
    cdef readonly bint wants_result
    cdef readonly bint wants_report
    cdef readonly bint is_own       # made by the worker's main process itself: no broker has seen its body
    cdef readonly double soft_time_limit
    cdef readonly double time_limit
    cdef readonly object json_body
    cdef readonly uint32_t seq
    cdef int64_t started_ns
    cdef bint answered              # its end was reported
    cdef dict _properties
