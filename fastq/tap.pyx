# cython: language_level=3
"""A sink in Python's hands: drives a broker's sources as the message loop does, without it. For the tests of brokers."""

from fastq.link cimport BatchSource, Delivery, Sink, Source
from fastq.wire.message cimport Message


cdef class Tap(Sink):
    """Keeps what sources bring, and tells them what becomes of it. Use it on the loop's thread."""
    cdef readonly list received     # deliveries, as they came
    cdef readonly list confirmed    # (delivery, whether what was sent or saved for it is stored)
    cdef object on_batch_end

    def __init__(self, on_batch_end):
        self.received = []
        self.confirmed = []
        self.on_batch_end = on_batch_end

    def attach(self, Source source) -> None:
        """Have a source bring its deliveries and confirmations here."""
        source.bind(self)

    def tell(self, Delivery delivery, int verdict) -> None:
        """Say what becomes of a delivery; the broker hears of it at the next flush."""
        delivery.settled = True
        delivery.source.tell(delivery, verdict)

    def send(self, Source source, Message message, Delivery owner) -> None:
        """Publish a message; its confirmation comes for ``owner``, for nobody when that is None."""
        source.send(message, owner)

    def save(self, BatchSource source, Delivery owner, str task_id, str state, bytes meta) -> None:
        """Save a result; its confirmation comes for ``owner``, for nobody when that is None."""
        source.keep_result(owner, task_id, state, meta, "", owner is not None)

    def flush(self, Source source) -> None:
        """Have everything go out, and ask for what there is room for."""
        source.flush(True)

    cdef int on_delivery(self, Delivery delivery) except -1:
        self.received.append(delivery)
        return 0

    cdef int on_confirmed(self, Delivery delivery, bint stored) except -1:
        self.confirmed.append((delivery, stored))
        return 0

    cdef int on_batch(self) except -1:
        self.on_batch_end()
        return 0
