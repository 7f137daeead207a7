# cython: language_level=3
"""Two places where deliveries wait in the main process: the line for a child, and the heap of those whose time will come.

Neither decides anything; times are unix times.
"""

cimport cython

from heapq import heapify, heappop, heappush


@cython.final
cdef class WaitingLine:
    cdef int join(self, Delivery delivery) except -1:
        """At the end."""
        delivery.next = None
        if self.last is None:
            self.first = delivery
        else:
            self.last.next = delivery
        self.last = delivery
        self.count += 1
        return 0

    cdef int join_first(self, Delivery delivery) except -1:
        """Before all others."""
        delivery.next = self.first
        self.first = delivery
        if self.last is None:
            self.last = delivery
        self.count += 1
        return 0

    cdef int leave(self) except -1:
        """Take out the first, which there is."""
        cdef Delivery delivery = self.first
        self.first = delivery.next
        if self.first is None:
            self.last = None
        delivery.next = None
        self.count -= 1
        return 0

    cdef list all(self):
        """Who waits, in order."""
        cdef Delivery each = self.first
        cdef list found = []
        while each is not None:
            found.append(each)
            each = each.next
        return found

    cdef list clear(self):
        """Take out and return all, in order."""
        cdef Delivery each
        cdef list found = self.all()
        for each in found:
            each.next = None
        self.first = self.last = None
        self.count = 0
        return found

    cdef list drop(self, Source source):
        """Take out and return those of a source."""
        cdef Delivery each
        cdef list dropped = []
        for each in self.clear():
            if each.source is source:
                dropped.append(each)
            else:
                self.join(each)
        return dropped


@cython.final
cdef class Later:
    def __init__(self):
        self.heap = []

    def __len__(self) -> int:
        return len(self.heap)

    cdef int put(self, Delivery delivery, double due) except -1:
        """Keep a delivery until then."""
        self.order += 1
        heappush(self.heap, (due, self.order, delivery))
        return 0

    cdef double first_due(self) except? -1:
        """When the first is due; there is one."""
        return <double> (<tuple> self.heap[0])[0]

    cdef Delivery take_due(self, double now):
        """Take out and return the first if it is due, else None."""
        if not self.heap or self.first_due() > now:
            return None
        return <Delivery> (<tuple> heappop(self.heap))[2]

    cdef list entries(self):
        """What waits as (due, order, delivery), soonest first."""
        return sorted(self.heap, key=_due_first)

    cdef list clear(self):
        """Take out and return all entries, soonest first."""
        found, self.heap = self.entries(), []
        return found

    cdef list drop(self, Source source):
        """Take out and return the deliveries of a source."""
        cdef list kept = [], dropped = []
        for entry in self.heap:
            if (<Delivery> (<tuple> entry)[2]).source is source:
                dropped.append((<tuple> entry)[2])
            else:
                kept.append(entry)
        heapify(kept)
        self.heap = kept
        return dropped

    cdef Py_ssize_t since(self, uint64_t order) except -1:
        """How many wait of those that were put here after so many."""
        cdef Py_ssize_t found = 0
        cdef uint64_t each
        for entry in self.heap:
            each = (<tuple> entry)[1]
            found += each > order
        return found


def _due_first(tuple entry):
    return entry[:2]
