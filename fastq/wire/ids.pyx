# cython: language_level=3, cdivision=True
"""Ids of tasks and messages: UUIDs as text. The system is asked for random bytes once for 256 of them."""

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.unicode cimport PyUnicode_DecodeLatin1
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from fastq.wire.dates cimport read_clock

import os

cdef uint8_t random_pool[4096]
cdef int random_left = 0
cdef const char *HEX = b"0123456789abcdef"


def _forget_random() -> None:
    global random_left
    random_left = 0


os.register_at_fork(after_in_child=_forget_random)


cdef uint8_t *random16() except NULL:
    """Return 16 random bytes, the caller's until the next call."""
    global random_left
    cdef bytes fresh
    if random_left == 0:
        fresh = os.urandom(sizeof(random_pool))
        memcpy(random_pool, PyBytes_AS_STRING(fresh), sizeof(random_pool))
        random_left = sizeof(random_pool)
    random_left -= 16
    return random_pool + random_left


cdef str to_text(uint8_t *p, uint8_t version):
    """Mark 16 bytes as a UUID of this version (RFC 9562) and return its text."""
    cdef char text[36]
    cdef int i, at = 0
    p[6] = (p[6] & 0x0F) | (version << 4)
    p[8] = (p[8] & 0x3F) | 0x80
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            text[at] = c'-'
            at += 1
        text[at] = HEX[p[i] >> 4]
        text[at + 1] = HEX[p[i] & 15]
        at += 2
    return PyUnicode_DecodeLatin1(text, 36, NULL)


def new_id() -> str:
    """Return a new UUID of version 7: those made one after the other sort so, and stores keep them in fewer pages."""
    cdef uint64_t now_ms = <uint64_t> (read_clock() * 1000)
    cdef uint8_t *p = random16()
    cdef int i
    for i in range(6):
        p[i] = <uint8_t> ((now_ms >> (40 - 8 * i)) & 0xFF)
    return to_text(p, 7)


def new_uuid4() -> str:
    """Return a new random UUID (version 4), as Celery's tasks have."""
    return to_text(random16(), 4)
