# cython: language_level=3
"""AMQP 0-9-1 frames: bytes to frames and back, and the few methods that every message needs. No sockets, no clock.

Source: AMQP 0-9-1 specification, sections 2.3.5 and 4.2.3. All other methods are encoded by librabbitmq in ``wire.amqp``.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.string cimport memcpy

from fastq.wire.buffer cimport load_u16, load_u32, store_u16, store_u32, store_u64

from fastq.errors import EncodeError, RemoteProtocolError

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"


cdef inline uint8_t *open_frame(Writer out, uint8_t kind, uint16_t channel, uint32_t payload) except NULL:
    """Write the frame's head and end byte and return where its payload goes."""
    cdef uint8_t *p = out.reserve(payload + FRAME_OVERHEAD)
    p[0] = kind
    store_u16(p + 1, channel)
    store_u32(p + 3, payload)
    p[7 + payload] = FRAME_END
    return p + 7


cdef int put_publish(Writer out, uint16_t channel, const char *exchange, Py_ssize_t exchange_size, const char *routing_key,
                     Py_ssize_t routing_key_size, const char *props, Py_ssize_t props_size, const char *body,
                     Py_ssize_t body_size, Py_ssize_t frame_max, bint mandatory) except -1:
    cdef uint8_t *p
    cdef Py_ssize_t part
    if exchange_size > 255 or routing_key_size > 255:
        raise EncodeError("an exchange name or routing key is longer than 255 bytes")
    if props_size + 12 + FRAME_OVERHEAD > frame_max:
        raise EncodeError(
            f"message headers take {props_size} bytes, more than one AMQP frame of {frame_max} holds: send less in headers")
    p = open_frame(out, FRAME_METHOD, channel, <uint32_t> (9 + exchange_size + routing_key_size))
    store_u32(p, 0x003C0028)
    store_u16(p + 4, 0)
    p[6] = <uint8_t> exchange_size
    memcpy(p + 7, exchange, exchange_size)
    p += 7 + exchange_size
    p[0] = <uint8_t> routing_key_size
    memcpy(p + 1, routing_key, routing_key_size)
    p[1 + routing_key_size] = 1 if mandatory else 0
    p = open_frame(out, FRAME_HEADER, channel, <uint32_t> (12 + props_size))
    store_u16(p, 60)
    store_u16(p + 2, 0)
    store_u64(p + 4, body_size)
    memcpy(p + 12, props, props_size)
    while body_size > 0:
        part = body_size if body_size <= frame_max - FRAME_OVERHEAD else frame_max - FRAME_OVERHEAD
        memcpy(open_frame(out, FRAME_BODY, channel, <uint32_t> part), body, part)
        body += part
        body_size -= part
    return 0


cdef int put_message(Writer out, uint16_t channel, Message message, Py_ssize_t frame_max, bint mandatory) except -1:
    cdef Py_ssize_t exchange_size, routing_key_size
    cdef const char *exchange = PyUnicode_AsUTF8AndSize(message.exchange, &exchange_size)
    cdef const char *routing_key = PyUnicode_AsUTF8AndSize(message.routing_key, &routing_key_size)
    return put_publish(out, channel, exchange, exchange_size, routing_key, routing_key_size,
                       PyBytes_AS_STRING(message.props), PyBytes_GET_SIZE(message.props),
                       PyBytes_AS_STRING(message.body), PyBytes_GET_SIZE(message.body), frame_max, mandatory)


cdef int put_ack(Writer out, uint16_t channel, uint64_t tag, bint multiple) except -1:
    cdef uint8_t *p = open_frame(out, FRAME_METHOD, channel, 13)
    store_u32(p, BASIC_ACK)
    store_u64(p + 4, tag)
    p[12] = 1 if multiple else 0
    return 0


cdef int put_nack(Writer out, uint16_t channel, uint64_t tag, bint requeue) except -1:
    cdef uint8_t *p = open_frame(out, FRAME_METHOD, channel, 13)
    store_u32(p, BASIC_NACK)
    store_u64(p + 4, tag)
    p[12] = 2 if requeue else 0
    return 0


def publish_frames(int channel, Message message, Py_ssize_t frame_max=131072, bint mandatory=False) -> bytes:
    """Return the method, header and body frames that publish a message."""
    cdef Writer out = Writer()
    put_message(out, <uint16_t> channel, message, frame_max, mandatory)
    return out.take()


def method_frame(int channel, uint32_t method_id, bytes arguments) -> bytes:
    """Return a method frame; ``arguments`` are encoded already."""
    cdef Writer out = Writer()
    cdef Py_ssize_t size = PyBytes_GET_SIZE(arguments)
    cdef uint8_t *p = open_frame(out, FRAME_METHOD, <uint16_t> channel, <uint32_t> (4 + size))
    store_u32(p, method_id)
    memcpy(p + 4, PyBytes_AS_STRING(arguments), size)
    return out.take()


def ack_frame(int channel, uint64_t tag, bint multiple=False) -> bytes:
    """Return a basic.ack frame."""
    cdef Writer out = Writer()
    put_ack(out, <uint16_t> channel, tag, multiple)
    return out.take()


cdef class FrameReader:
    """Bytes in any pieces to whole frames. Holds at most one incomplete frame; its size is checked before it is awaited."""

    cdef readonly Py_ssize_t limit
    cdef bytes rest

    def __init__(self, Py_ssize_t frame_max=131072):
        self.limit = frame_max
        self.rest = b""

    def set_limit(self, Py_ssize_t frame_max) -> None:
        """Use the frame size that was negotiated."""
        self.limit = frame_max

    @cython.boundscheck(False)
    def feed(self, bytes data) -> list[tuple[int, int, bytes]]:
        """Return the complete frames as (type, channel, payload). Raises RemoteProtocolError on a false size or end byte."""
        cdef list frames = []
        cdef bytes joined = self.rest + data if self.rest else data
        cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(joined)
        cdef Py_ssize_t at = 0, size = PyBytes_GET_SIZE(joined), payload
        while size - at >= 7:
            payload = load_u32(p + at + 3)
            if payload + FRAME_OVERHEAD > self.limit:
                raise RemoteProtocolError(f"frame of {payload + FRAME_OVERHEAD} bytes, at most {self.limit} were agreed on")
            if size - at < payload + FRAME_OVERHEAD:
                break
            if p[at + 7 + payload] != FRAME_END:
                raise RemoteProtocolError(f"frame does not end in 0xCE but in 0x{p[at + 7 + payload]:02X}")
            frames.append((p[at], load_u16(p + at + 1), PyBytes_FromStringAndSize(<const char *> p + at + 7, payload)))
            at += payload + FRAME_OVERHEAD
        self.rest = joined[at:] if at else joined
        return frames
