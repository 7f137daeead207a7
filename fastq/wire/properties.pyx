# cython: language_level=3, boundscheck=False, wraparound=False
"""Basic properties of AMQP messages as Python values, in one pass over the bytes. No I/O, no clock.

What task messages hold is read here; a property, a type or a text that is rare, and whatever is malformed, is left to
librabbitmq in ``wire.amqp``, which also words the errors. Both give the same values: the tests compare them.
Source: AMQP 0-9-1 specification, 4.2.5 and 1.8.3.1, with RabbitMQ's field types.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy

from fastq.wire.buffer cimport load_u16, load_u32, load_u64

from fastq.errors import RemoteProtocolError

cdef enum:
    READ_HERE = 0xFF00      # from the content type to the expiration; the rest is rare
    MAX_DEPTH = 8           # Celery's own headers nest 3 deep
    MAX_BYTES = 1 << 20     # as in wire.amqp
    KNOWN_KEYS = 64         # a power of two


class Rare(Exception):
    """The bytes hold something that is not read here."""


cdef struct Cursor:
    const uint8_t *at
    const uint8_t *end


#: The last key seen at each place of a table: messages of one sender have the same keys in the same order.
cdef list known_keys = [""] * KNOWN_KEYS


cdef const uint8_t *take(Cursor *cursor, Py_ssize_t size) except NULL:
    """Return the next ``size`` bytes and step behind them. Raises Rare when there are fewer."""
    cdef const uint8_t *start = cursor.at
    if size > cursor.end - start:
        raise Rare
    cursor.at = start + size
    return start


cdef str read_short(Cursor *cursor):
    cdef Py_ssize_t size = take(cursor, 1)[0]
    return PyUnicode_DecodeUTF8(<const char *> take(cursor, size), size, NULL)


cdef str read_key(Cursor *cursor, int place):
    cdef Py_ssize_t known_size, size = take(cursor, 1)[0]
    cdef const char *start = <const char *> take(cursor, size)
    cdef str key = <str> known_keys[place & (KNOWN_KEYS - 1)]
    cdef const char *known = PyUnicode_AsUTF8AndSize(key, &known_size)
    if known_size != size or memcmp(known, start, size) != 0:
        key = PyUnicode_DecodeUTF8(start, size, NULL)
        known_keys[place & (KNOWN_KEYS - 1)] = key
    return key


cdef object read_value(Cursor *cursor, int depth):
    cdef uint8_t kind = take(cursor, 1)[0]
    cdef Py_ssize_t size
    cdef uint64_t bits
    cdef double number
    if kind == c'V':
        return None
    if kind == c'S':
        size = load_u32(take(cursor, 4))
        return PyUnicode_DecodeUTF8(<const char *> take(cursor, size), size, NULL)
    if kind == c'I':
        return <int32_t> load_u32(take(cursor, 4))
    if kind == c't':
        return take(cursor, 1)[0] != 0
    if kind == c'A':
        return read_array(cursor, depth)
    if kind == c'F':
        return read_table(cursor, depth)
    if kind == c'l':
        return <int64_t> load_u64(take(cursor, 8))
    if kind == c'd':
        bits = load_u64(take(cursor, 8))
        memcpy(&number, &bits, sizeof(number))
        return number
    raise Rare


cdef int enter(Cursor *cursor, Cursor *inner, int depth) except -1:
    """Point ``inner`` at the table or array that comes next, and step behind it. Raises Rare."""
    cdef Py_ssize_t size = load_u32(take(cursor, 4))
    if depth > MAX_DEPTH:
        raise Rare
    inner.at = take(cursor, size)
    inner.end = cursor.at
    return 0


cdef list read_array(Cursor *cursor, int depth):
    cdef Cursor inner
    cdef list values = []
    enter(cursor, &inner, depth)
    while inner.at < inner.end:
        values.append(read_value(&inner, depth + 1))
    return values


cdef dict read_table(Cursor *cursor, int depth):
    cdef Cursor inner
    cdef dict values = {}
    cdef int place = 0
    enter(cursor, &inner, depth)
    while inner.at < inner.end:
        key = read_key(&inner, place)
        values[key] = read_value(&inner, depth + 1)
        place += 1
    return values


cdef dict read_properties(bytes props, bint bounded):
    cdef Cursor cursor
    cdef uint16_t flags
    cdef dict found = {}
    cursor.at = <const uint8_t *> PyBytes_AS_STRING(props)
    cursor.end = cursor.at + PyBytes_GET_SIZE(props)
    flags = load_u16(take(&cursor, 2))
    if flags & ~READ_HERE or (bounded and PyBytes_GET_SIZE(props) > MAX_BYTES):
        raise Rare
    if flags & HAS_CONTENT_TYPE:
        found["content_type"] = read_short(&cursor)
    if flags & HAS_CONTENT_ENCODING:
        found["content_encoding"] = read_short(&cursor)
    if flags & HAS_HEADERS:
        found["headers"] = read_table(&cursor, 1)
    if flags & HAS_DELIVERY_MODE:
        found["delivery_mode"] = take(&cursor, 1)[0]
    if flags & HAS_PRIORITY:
        found["priority"] = take(&cursor, 1)[0]
    if flags & HAS_CORRELATION_ID:
        found["correlation_id"] = read_short(&cursor)
    if flags & HAS_REPLY_TO:
        found["reply_to"] = read_short(&cursor)
    if flags & HAS_EXPIRATION:
        found["expiration"] = read_short(&cursor)
    if cursor.at != cursor.end:
        raise Rare
    return found


def decode_properties(bytes props not None, bint bounded=True) -> dict[str, object]:
    """Return encoded basic properties as a dict of those present. Raises RemoteProtocolError when they are malformed.

    So are more than MAX_BYTES; ``bounded=False`` reads those too, where nobody waits and the message was let in as a whole.
    What is rare in headers is bounded all the same.
    """
    try:
        return read_properties(props, bounded)
    except (Rare, UnicodeDecodeError):
        from fastq.wire.amqp import decode_properties as decode_any  # programs without RabbitMQ hardly ever need it
        return decode_any(props)


def readable_properties(bytes props not None) -> dict[str, object]:
    """Return the same, {} for properties that cannot be read: where they are shown or passed over, not decided on."""
    try:
        return decode_properties(props)
    except RemoteProtocolError:
        return {}
