# cython: language_level=3
"""Threads that run calls, and exceptions that are raised in them from outside.

Compiled, so that nothing comes between two steps: an exception that is raised from outside arrives before the next step
of Python code of that thread, and must not arrive once the function has ended that it is meant for.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport uint32_t

from fastq.wire.call cimport Call

import threading

from fastq.pool.outside import absorb, imports, release_locks

cdef extern from "Python.h":
    int PyThreadState_SetAsyncExc(unsigned long thread, PyObject *exception)


cdef class Entry:
    """A call, and where it runs."""
    cdef Call call
    cdef unsigned long thread
    cdef bint is_inside     # in the function that an exception may be raised in
    cdef object wanted      # the exception that was asked for before that
    cdef bint is_struck
    cdef bint is_cancelled


cdef class Strikes:
    """The calls that threads run, by their numbers."""

    cdef dict entries

    def __init__(self):
        self.entries = {}

    def __contains__(self, Call call not None) -> bool:
        return call.seq in self.entries

    @property
    def cancelled(self) -> int:
        """How many calls run on that were cancelled."""
        cdef Entry each
        return sum([each.is_cancelled for each in self.entries.values()])

    def __len__(self) -> int:
        return len(self.entries)

    def expect(self, Call call not None) -> None:
        """Know a call that is about to be run by some thread: it may be cancelled before that."""
        cdef Entry entry = Entry.__new__(Entry)
        entry.call = call
        self.entries[call.seq] = entry

    def run(self, Call call not None, function) -> None:
        """Call the function with the call that was expected; it can be struck by its number meanwhile."""
        cdef Entry entry = self.entries[call.seq]
        entry.thread = threading.get_ident()
        try:
            function(call)
        finally:
            del self.entries[call.seq]

    def guard(self, Call call not None, function, args, kwargs):
        """Return what the function returns, in which exceptions may be raised from outside meanwhile."""
        cdef Entry entry = self.entries.get(call.seq)
        if entry is None or entry.is_inside:
            return function(*args, **kwargs)
        if entry.wanted is not None:
            exception, entry.wanted = entry.wanted, None
            entry.is_struck = True
            raise exception()
        entry.is_inside = True
        try:
            return function(*args, **kwargs)
        finally:
            entry.is_inside = False
            if entry.is_struck:
                try:
                    absorb()
                except BaseException:   # it has arrived at that function's first step
                    pass
                release_locks()

    def strike(self, uint32_t seq, exception) -> bool:
        """Raise an exception, given as its class, in a call; when its function begins, if it has not.

        False: it imports something, and that is spared.
        """
        cdef Entry entry = self.entries.get(seq)
        if entry is None:
            return True
        if not entry.is_inside:
            entry.wanted = exception
            return True
        if imports(entry.thread):
            return False
        if not entry.is_inside:     # it has ended, or not begun again, meanwhile
            entry.wanted = exception
            return True
        # From here on no other thread runs.
        entry.is_struck = True
        PyThreadState_SetAsyncExc(entry.thread, <PyObject *> exception)
        return True

    def is_importing(self, Call call not None) -> bool:
        """Return whether this call, which runs, imports something."""
        cdef Entry entry = self.entries.get(call.seq)
        return entry is not None and entry.is_inside and imports(entry.thread)

    def cancel(self, uint32_t seq) -> Call | None:
        """Note that a call is to end, as nobody asks for its outcome; return it, None when it does not run."""
        cdef Entry entry = self.entries.get(seq)
        if entry is None:
            return None
        entry.is_cancelled = True
        return entry.call

    def forget(self, Call call not None) -> None:
        """Know a call no more that nobody will run."""
        self.entries.pop(call.seq, None)

    def is_cancelled(self, Call call not None) -> bool:
        """Return whether this call, which runs, was cancelled."""
        cdef Entry entry = self.entries.get(call.seq)
        return entry is not None and entry.is_cancelled

    def is_struck(self, Call call not None) -> bool:
        """Return whether an exception was raised in this call, which runs."""
        cdef Entry entry = self.entries.get(call.seq)
        return entry is not None and entry.is_struck
