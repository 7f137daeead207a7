"""What a delivery is, who brings it and who takes it. Declarations."""

from libc.stdint cimport uint32_t, uint64_t

from fastq.wire.ack_window cimport AckWindow
from fastq.wire.head cimport Head
from fastq.wire.message cimport Message


# What becomes of a delivery.
cpdef enum:
    ACK = 0             # done: the broker may forget it
    REJECT = 1          # never to run again: to the dead letters, if there are any
    REQUEUE = 2         # back to the queue
    RETURN = 3          # back to the queue as if it had never been here: it was not started


# The ledger: each delivery is in one of these states.
cdef enum LedgerState:
    RECEIVED = 0        # admitted, waiting for a child (or for its ETA)
    DISPATCHED          # handed to a child, not started
    STARTED             # running
    FINISHED            # ran; its result or follow-ups are not confirmed yet
    SETTLED             # the broker has been told, or is about to be in the next flush
    LEDGER_STATES


cdef class Delivery:
    cdef Source source
    cdef readonly uint64_t tag
    cdef AckWindow channel      # that brought it, with AMQP
    cdef bytes exchange
    cdef bytes routing_key
    cdef bytes consumer         # tag of the subscription that brought it, with AMQP
    cdef bytes props
    cdef bytes body
    cdef Head head
    cdef object options         # the core's TaskRules
    cdef public object request  # what the hooks have made of it
    cdef int deliveries         # how often the broker has handed it out, this time included
    cdef int deaths             # children that died of it here
    cdef object reason          # why it is rejected, as text
    cdef int state
    cdef int verdict
    cdef int pending            # confirmations awaited before it may be settled
    cdef bint oversized         # above max_message_bytes: its body was not kept
    cdef bint unsafe            # a follow-up of it was refused: it must run again
    cdef bint settled           # told to the source (early acknowledgement: before it ran)
    cdef bint is_rated          # its turn under the task's rate limit is assigned
    cdef bint shelved           # it ran; its result waits for a store that is away, and it does not count as held
    cdef uint32_t seq
    cdef Delivery next


cdef class Sink:
    """Who takes deliveries and confirmations: the core."""
    cdef int on_delivery(self, Delivery delivery) except -1
    cdef int on_confirmed(self, Delivery delivery, bint stored) except -1
    cdef int on_batch(self) except -1


cdef class Source:
    """Where deliveries come from and verdicts go."""
    cdef Sink sink
    cdef readonly bint dead             # the connection is gone: verdicts have nowhere to go
    cdef public Py_ssize_t window       # deliveries that may be here unsettled; 0 = no bound
    cdef readonly Py_ssize_t held       # deliveries that are
    cdef readonly Py_ssize_t held_bytes
    cdef readonly Py_ssize_t shelved    # deliveries besides those, which have run and wait for a result store that is away
    cdef public Py_ssize_t max_held_bytes   # reading stops above this
    cdef public bint is_own             # it brings calls that the main process has made itself, not a broker's messages
    cdef public object postpone         # (delivery as a dict, unix time) -> Message that brings it back then, or None
    cdef public object dead_letter      # (Delivery, reason) -> whether it is moved to the dead letters here; Core.buried follows

    cdef int bind(self, Sink sink) except -1
    cdef int give(self, Delivery delivery) except -1
    cdef Py_ssize_t most_for_later(self) noexcept
    cdef int tell(self, Delivery delivery, int verdict) except -1
    cdef int forget(self, Delivery delivery) except -1
    cdef int shelve(self, Delivery delivery) except -1
    cdef int send(self, Message message, Delivery owner) except -1
    cdef int flush(self, bint now) except -1
    cdef bint owes(self) noexcept


cdef class BatchSource(Source):
    cdef list verdicts
    cdef dict reasons           # why deliveries are rejected, by tag
    cdef list results
    cdef list messages
    cdef dict owners            # deliveries by the token of what they wait for
    cdef dict sent              # messages by token, until they are confirmed
    cdef dict unsaved           # results by token, until they are confirmed
    cdef readonly Py_ssize_t unsaved_bytes
    cdef bint is_stuck          # the oldest of them waits for longer than a store that works needs
    cdef uint64_t oldest_seen
    cdef uint64_t next_token
    cdef Py_ssize_t pulled

    cdef bint keep_result(self, Delivery delivery, str task_id, str state, bytes meta, str reply_to, bint confirm) except -1
    cdef Delivery drop_token(self, object token)
