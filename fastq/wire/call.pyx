# cython: language_level=3
"""A call in the child, which reads of a message what it needs. No decoding of bodies."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.string cimport memcpy

from fastq.wire.dates cimport format_iso8601, read_clock

from fastq.wire.properties import decode_properties


cdef class Call:
    """A delivery as the child sees it: who is to run, with the body and the properties still encoded."""

    def properties(self) -> dict[str, object]:
        """Return all message properties; decoded on first use."""
        if self._properties is None:
            self._properties = decode_properties(self.props, False)
        return self._properties

    @property
    def started_s(self) -> float:
        """When it started, on the monotonic clock in seconds."""
        return self.started_ns * 1e-9

    def headers(self) -> dict[str, object]:
        """Return all message headers; decoded on first use."""
        return self.properties().get("headers") or {}

    def success_meta(self, bytes value) -> bytes | None:
        """Return the stored form of a success with this encoded value, None when the id needs escaping in JSON."""
        cdef Py_ssize_t id_size, i
        cdef const char *id_text
        cdef Py_ssize_t value_size = PyBytes_GET_SIZE(value)
        cdef bytes out
        cdef char *p
        if not self.id.isascii():
            return None
        id_text = PyUnicode_AsUTF8AndSize(self.id, &id_size)
        for i in range(id_size):
            if not (c'a' <= id_text[i] <= c'z' or c'0' <= id_text[i] <= c'9' or c'A' <= id_text[i] <= c'Z' or id_text[i] == c'-'
                    or id_text[i] == c'_' or id_text[i] == c'.'):
                return None
        out = PyBytes_FromStringAndSize(NULL, 29 + value_size + 45 + 32 + 13 + id_size + 2)
        p = PyBytes_AS_STRING(out)
        memcpy(p, b'{"status":"SUCCESS","result":', 29)
        memcpy(p + 29, PyBytes_AS_STRING(value), value_size)
        p += 29 + value_size
        memcpy(p, b',"traceback":null,"children":[],"date_done":"', 45)
        memcpy(p + 45, PyBytes_AS_STRING(format_iso8601(read_clock())), 32)
        memcpy(p + 77, b'","task_id":"', 13)
        memcpy(p + 90, id_text, id_size)
        memcpy(p + 90 + id_size, b'"}', 2)
        return out

    def __repr__(self):
        return f"<Call {self.name}[{self.id}]>"
