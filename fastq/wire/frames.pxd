"""AMQP 0-9-1 frames: declarations for those who write them into their own buffer."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastq.wire.buffer cimport Writer
from fastq.wire.message cimport Message


cdef enum:
    FRAME_METHOD = 1
    FRAME_HEADER = 2
    FRAME_BODY = 3
    FRAME_HEARTBEAT = 8
    FRAME_END = 0xCE
    FRAME_OVERHEAD = 8              # 7 bytes before the payload, the end byte after it
    FRAME_MIN_SIZE = 4096           # specification 1.2: every peer accepts this
    BASIC_DELIVER = 0x003C003C
    BASIC_RETURN = 0x003C0032
    BASIC_ACK = 0x003C0050
    BASIC_NACK = 0x003C0078


cdef int put_publish(Writer out, uint16_t channel, const char *exchange, Py_ssize_t exchange_size, const char *routing_key,
                     Py_ssize_t routing_key_size, const char *props, Py_ssize_t props_size, const char *body,
                     Py_ssize_t body_size, Py_ssize_t frame_max, bint mandatory) except -1
cdef int put_message(Writer out, uint16_t channel, Message message, Py_ssize_t frame_max, bint mandatory) except -1
cdef int put_ack(Writer out, uint16_t channel, uint64_t tag, bint multiple) except -1
cdef int put_nack(Writer out, uint16_t channel, uint64_t tag, bint requeue) except -1
