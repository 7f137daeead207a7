# cython: language_level=3
"""What a process of the pool asks of Linux that Python has no call for. Source: prctl(2)."""

from cpython.exc cimport PyErr_SetFromErrno

cdef extern from "sys/prctl.h" nogil:
    int prctl(int option, unsigned long argument, ...)
    int PR_SET_PDEATHSIG
    int PR_SET_NAME

import signal


def die_with_parent() -> None:
    """Have the kernel kill this process the moment its parent dies, however that happens."""
    if prctl(PR_SET_PDEATHSIG, <unsigned long> <int> signal.SIGKILL, 0, 0, 0) < 0:
        PyErr_SetFromErrno(OSError)


def set_name(name: bytes) -> None:
    """Name this process as ``top`` and ``ps -o comm`` show it (15 bytes)."""
    cdef const char *text = name
    prctl(PR_SET_NAME, <unsigned long> text, 0, 0, 0)
