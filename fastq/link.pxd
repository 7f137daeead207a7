"""The compiled hot half of a connection: what a delivery is, who takes it, and AMQP's way of bringing it. Declarations."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq.wire.ack_window cimport AckWindow
from fastq.wire.buffer cimport Writer
from fastq.wire.message cimport Head, Message


# What becomes of a delivery.
cdef enum Verdict:
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


cdef class Channel(AckWindow):
    """An AMQP channel that brings deliveries. Tags are its own: it alone can acknowledge what it has brought."""
    cdef int number
    cdef uint64_t owed[64]
    cdef int owed_count


cdef class Delivery:
    cdef Source source
    cdef readonly uint64_t tag
    cdef Channel channel        # with AMQP
    cdef bytes exchange
    cdef bytes routing_key
    cdef bytes consumer         # tag of the subscription that brought it, with AMQP
    cdef bytes props
    cdef bytes body
    cdef Head head
    cdef object options         # the core's TaskOptions
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

    cdef int bind(self, Sink sink) except -1
    cdef int give(self, Delivery delivery) except -1
    cdef int tell(self, Delivery delivery, int verdict) except -1
    cdef int forget(self, Delivery delivery) except -1
    cdef int shelve(self, Delivery delivery) except -1
    cdef int send(self, Message message, Delivery owner) except -1
    cdef int flush(self, bint now) except -1
    cdef bint owes(self) noexcept


cdef class AmqpLink(Source):
    cdef public object on_method
    cdef public object on_returned
    cdef public object on_lost
    cdef public object on_unknown_queue
    cdef set known_queues       # where follow-ups may go
    cdef dict held_back         # (message, owner) by queue, until the queue is known
    cdef public int publish_channel
    cdef public Py_ssize_t frame_max
    cdef public Py_ssize_t max_message_bytes
    cdef readonly double received_at
    cdef readonly double sent_at
    cdef readonly object transport
    cdef readonly bint is_paused        # nothing is read until some of what is held has been settled
    cdef object write_bytes
    cdef bytearray buffer
    cdef object view
    cdef Py_ssize_t end
    cdef Py_ssize_t arrived     # deliveries since rate_since
    cdef int64_t rate_since
    cdef double rate            # deliveries a second
    cdef Writer out
    cdef readonly dict channels  # those that bring deliveries, by number
    cdef list owing             # those of them that owe acks
    cdef int owed_count         # how many acks they owe together, 64 at most
    # the content that is arriving
    cdef int content            # 0 none, else BASIC_DELIVER or BASIC_RETURN
    cdef int content_number     # its channel's
    cdef Channel content_channel
    cdef uint64_t content_tag
    cdef bint content_redelivered
    cdef bint content_oversized
    cdef bytes content_exchange, content_routing_key, content_consumer, content_props, content_body
    cdef list content_parts      # of a body in several frames
    cdef object content_arguments
    cdef uint64_t body_size
    cdef Py_ssize_t body_got
    # confirms
    cdef bint confirming
    cdef uint64_t publish_tag
    cdef uint64_t confirmed_to
    cdef dict unconfirmed

    cdef int let_go(self) except -1
    cdef int parse(self) except -1
    cdef int moderate(self, Py_ssize_t count) except -1
    cdef int on_frame(self, uint8_t kind, uint16_t channel, const uint8_t *p, Py_ssize_t size) except -1
    cdef int on_deliver(self, uint16_t channel, const uint8_t *p, Py_ssize_t size) except -1
    cdef int on_header(self, const uint8_t *p, Py_ssize_t size) except -1
    cdef int on_content(self) except -1
    cdef int on_confirm(self, uint64_t tag, bint multiple, bint stored) except -1
    cdef int write_acks(self) except -1
    cdef int send_now(self, Message message, Delivery owner) except -1
    cdef int write_out(self) except -1


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
