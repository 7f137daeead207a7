# cython: language_level=3
"""What a process of the pool asks of Linux that Python has no call for. Source: prctl(2), timer_create(2)."""

from cpython.exc cimport PyErr_SetFromErrno
from libc.string cimport memset
from posix.signal cimport SIGEV_SIGNAL, sigevent
from posix.time cimport CLOCK_MONOTONIC, itimerspec, timespec, timer_create, timer_delete, timer_settime
from posix.types cimport time_t, timer_t

cdef extern from "sys/prctl.h" nogil:
    int prctl(int option, unsigned long argument, ...)
    int PR_SET_PDEATHSIG
    int PR_SET_NAME
    int PR_GET_CHILD_SUBREAPER

import signal


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal the moment its parent dies, however that happens."""
    if prctl(PR_SET_PDEATHSIG, <unsigned long> <int> number, 0, 0, 0) < 0:
        PyErr_SetFromErrno(OSError)


def is_subreaper() -> bool:
    """Return whether orphans below this process become its children."""
    cdef int found = 0
    return prctl(PR_GET_CHILD_SUBREAPER, <unsigned long> &found, 0, 0, 0) == 0 and found != 0


def set_name(name: bytes) -> None:
    """Name this process as ``top`` and ``ps -o comm`` show it (15 bytes)."""
    cdef const char *text = name
    prctl(PR_SET_NAME, <unsigned long> text, 0, 0, 0)


#: Raises the soft time limit in a child. Nobody's but ours: SIGALRM and its timer belong to the tasks.
LIMIT_SIGNAL = signal.SIGRTMAX - 1
#: Has a child write the stacks of its threads to the log's file. In a Celery application USR1 is the task's soft time limit.
DUMP_SIGNAL = signal.SIGRTMAX - 2
#: Has it write them to the memory that it shares with the main process, which logs them.
STACKS_SIGNAL = signal.SIGRTMAX - 3


cdef int put_seconds(timespec *span, double seconds) noexcept:
    span.tv_sec = <time_t> seconds
    span.tv_nsec = <long> ((seconds - <double> span.tv_sec) * 1e9)
    return 0


cdef class Timer:
    """A timer of this process that sends a signal, besides the one behind ``signal.alarm``; forks do not inherit it."""

    cdef timer_t timer
    cdef bint exists

    def __cinit__(self, int signum):
        cdef sigevent event
        memset(&event, 0, sizeof(event))
        event.sigev_notify = SIGEV_SIGNAL
        event.sigev_signo = signum
        if timer_create(CLOCK_MONOTONIC, &event, &self.timer) < 0:
            PyErr_SetFromErrno(OSError)
        self.exists = True

    def __dealloc__(self):
        if self.exists:
            timer_delete(self.timer)

    def set(self, double seconds, double again=0) -> None:
        """Have the signal come in so many seconds (0: not at all), and ``again`` after each so many (0: once)."""
        cdef itimerspec when
        memset(&when, 0, sizeof(when))
        put_seconds(&when.it_value, seconds)
        put_seconds(&when.it_interval, again)
        if timer_settime(self.timer, 0, &when, NULL) < 0:
            PyErr_SetFromErrno(OSError)
