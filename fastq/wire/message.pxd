"""A message on its way out: declarations."""

from fastq.wire.buffer cimport Writer

cdef int put_shortstr(Writer out, str text) except -1
cdef bytes encode_result_properties(const char *task_id, Py_ssize_t size)


cdef class Message:
    cdef readonly str exchange
    cdef readonly str routing_key
    cdef readonly bytes props
    cdef readonly bytes body
    cdef readonly str id
    cdef readonly int priority
    cdef readonly object due
    cdef readonly object expires
