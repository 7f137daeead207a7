"""RabbitMQ's hot half: one connection's bytes, and the channels that bring deliveries. Declarations."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t

from fastq.link cimport Delivery, Source
from fastq.wire.ack_window cimport AckWindow
from fastq.wire.buffer cimport Writer
from fastq.wire.message cimport Message


cdef class Channel(AckWindow):
    """An AMQP channel that brings deliveries. Tags are its own: it alone can acknowledge what it has brought."""
    cdef int number
    cdef uint64_t owed[64]
    cdef int owed_count


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
