# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The JSON envelope in which kombu keeps a message on brokers that know only strings: Redis, SQS. No sockets, no clock.

Written byte for byte as kombu writes it; read leniently, but what has no form as AMQP properties is refused. Lone
surrogates stand in properties as py-amqp writes them ("surrogatepass"), in JSON as escapes.
Source: kombu 5.7, virtual transports; checked against its output in the tests.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from fastq.wire.buffer cimport Writer, load_double, load_u16, load_u32, load_u64
from fastq.wire.message cimport Message

from binascii import a2b_base64, b2a_base64

import json
import re

import orjson

from fastq.errors import DecodeError, EncodeError
from fastq.wire.message import encode_properties

cdef enum:
    MAX_DEPTH = 32          # as in wire.message: no header goes deeper
    SAMPLE_BYTES = 4096     # of a message that cannot be read, to be logged
    MAX_ODD_BYTES = 1 << 20     # chosen: beside its body a message holds less; the json module is slow
    MAX_OTHER_BYTES = 4 << 20   # chosen: of what is not text; values take up to 25 times as much memory as their JSON
    CONTENT_TYPE = 15       # bits of the property flags (AMQP 0-9-1, section 4.2.6.1)
    CONTENT_ENCODING = 14
    HEADERS = 13
    DELIVERY_MODE = 12
    PRIORITY = 11
    CORRELATION_ID = 10
    REPLY_TO = 9
    EXPIRATION = 8
    MESSAGE_ID = 7
    TIMESTAMP = 6
    TYPE = 5
    USER_ID = 4
    APP_ID = 3
    CLUSTER_ID = 2

#: The body, which is base64: most of a large message, and nothing in it needs the json module.
cdef object BODY = re.compile(rb'"body"\s*:\s*"([^"\\]*)"')

# Set where a message goes back to its queue: how often it had been handed out by then, under RabbitMQ's name for it.
cdef str DELIVERY_COUNT = "x-delivery-count"


# --- writing ----------------------------------------------------------------------------------------------------------

cdef struct Part:
    const uint8_t *p
    Py_ssize_t size


cdef const char *HEX = b"0123456789abcdef"


cdef int put_escape(Writer out, uint32_t unit) except -1:
    out.put(b"\\u", 2)
    out.put_u8(HEX[(unit >> 12) & 15])
    out.put_u8(HEX[(unit >> 8) & 15])
    out.put_u8(HEX[(unit >> 4) & 15])
    return out.put_u8(HEX[unit & 15])


cdef int put_character(Writer out, uint32_t character) except -1:
    """One character that does not stand for itself in JSON of pure ASCII."""
    if character == c'"':
        return out.put(b'\\"', 2)
    if character == c'\\':
        return out.put(b"\\\\", 2)
    if character == c'\n':
        return out.put(b"\\n", 2)
    if character == c'\r':
        return out.put(b"\\r", 2)
    if character == c'\t':
        return out.put(b"\\t", 2)
    if character == 8:
        return out.put(b"\\b", 2)
    if character == 12:
        return out.put(b"\\f", 2)
    if character < 0x10000:
        return put_escape(out, character)
    put_escape(out, 0xD800 + ((character - 0x10000) >> 10))
    return put_escape(out, 0xDC00 + ((character - 0x10000) & 0x3FF))


cdef uint64_t ONES = 0x0101010101010101
cdef uint64_t SPACES = ONES * c' '
cdef uint64_t QUOTES = ONES * c'"'
cdef uint64_t SLASHES = ONES * c'\\'
cdef uint64_t HIGHS = ONES * 0x80


cdef inline bint is_plain(uint32_t byte) noexcept nogil:
    return 32 <= byte < 127 and byte != c'"' and byte != c'\\'


cdef inline Py_ssize_t plain_bytes(const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """How many bytes at the beginning stand for themselves in JSON of pure ASCII."""
    cdef Py_ssize_t at = 0
    cdef uint64_t eight
    while size - at >= 8:
        memcpy(&eight, p + at, 8)
        # What is not plain sets its highest bit in a term, or has it; a carry comes only from a byte that has done so.
        if (eight | (eight - SPACES) | ((eight ^ QUOTES) - ONES) | ((eight ^ SLASHES) - ONES) | (eight + ONES)) & HIGHS:
            break
        at += 8
    while at < size and is_plain(p[at]):
        at += 1
    return at


cdef int put_text(Writer out, const uint8_t *p, Py_ssize_t size) except -1:
    """A JSON string; raises EncodeError when the bytes are not UTF-8."""
    cdef Py_ssize_t plain = plain_bytes(p, size)
    cdef Py_UCS4 character
    out.put_u8(c'"')
    out.put(p, plain)
    if plain < size:
        try:
            rest = PyUnicode_DecodeUTF8(<const char *> p + plain, size - plain, b"surrogatepass")
        except UnicodeDecodeError:
            raise EncodeError("a message property or header is not text in UTF-8") from None
        for character in rest:
            if is_plain(<uint32_t> character):
                out.put_u8(<uint8_t> character)
            else:
                put_character(out, <uint32_t> character)
    return out.put_u8(c'"')


cdef int put_str(Writer out, str text) except -1:
    cdef Py_ssize_t size
    cdef const char *p = PyUnicode_AsUTF8AndSize(text, &size)
    return put_text(out, <const uint8_t *> p, size)


cdef int put_ascii(Writer out, str text) except -1:
    """Text that needs no escapes, without quotes."""
    cdef Py_ssize_t size
    cdef const char *p = PyUnicode_AsUTF8AndSize(text, &size)
    return out.put(p, size)


cdef int put_integer(Writer out, int64_t value) except -1:
    cdef char digits[20]
    cdef int at = 20
    cdef uint64_t left = <uint64_t> value if value >= 0 else 0 - <uint64_t> value
    while at == 20 or left:
        at -= 1
        digits[at] = c'0' + <char> (left % 10)
        left //= 10
    if value < 0:
        out.put_u8(c'-')
    return out.put(digits + at, 20 - at)


cdef int put_number(Writer out, double value) except -1:
    """A float as the json module writes it."""
    if value != value:
        return out.put(b"NaN", 3)
    if value - value != 0:
        return put_ascii(out, "Infinity" if value > 0 else "-Infinity")
    return put_ascii(out, repr(value))


cdef Py_ssize_t need(Py_ssize_t size, Py_ssize_t left) except -1:
    if size > left:
        raise EncodeError("message properties are cut short")
    return size


cdef Py_ssize_t put_value(Writer out, uint8_t kind, const uint8_t *p, Py_ssize_t left, int depth) except -1:
    """One field value as JSON; returns how many bytes it took."""
    cdef Py_ssize_t size
    if depth > MAX_DEPTH:
        raise EncodeError(f"message headers are nested deeper than {MAX_DEPTH} levels")
    if kind == c'V':
        out.put(b"null", 4)
        return 0
    if kind == c'S' or kind == c'F' or kind == c'A':
        need(4, left)
        size = need(4 + <Py_ssize_t> load_u32(p), left)
        if kind == c'S':
            put_text(out, p + 4, size - 4)
        elif kind == c'F':
            put_table(out, p + 4, size - 4, depth + 1)
        else:
            put_array(out, p + 4, size - 4, depth + 1)
        return size
    if kind == c't':
        need(1, left)
        put_ascii(out, "true" if p[0] else "false")
        return 1
    if kind == c'I':
        need(4, left)
        put_integer(out, <int32_t> load_u32(p))
        return 4
    if kind == c'l':
        need(8, left)
        put_integer(out, <int64_t> load_u64(p))
        return 8
    if kind == c'd':
        need(8, left)
        put_number(out, load_double(p))
        return 8
    raise EncodeError(f"a message header of AMQP type {chr(kind)!r} has no form in a JSON envelope: send text instead")


cdef int put_table(Writer out, const uint8_t *p, Py_ssize_t size, int depth) except -1:
    cdef Py_ssize_t at = 0, length
    out.put_u8(c'{')
    while at < size:
        if at:
            out.put(b", ", 2)
        length = need(1 + p[at], size - at - 1)
        put_text(out, p + at + 1, length - 1)
        out.put(b": ", 2)
        at += 1 + length
        at += put_value(out, p[at - 1], p + at, size - at, depth)
    return out.put_u8(c'}')


cdef int put_array(Writer out, const uint8_t *p, Py_ssize_t size, int depth) except -1:
    cdef Py_ssize_t at = 0
    out.put_u8(c'[')
    while at < size:
        if at:
            out.put(b", ", 2)
        at += 1
        at += put_value(out, p[at - 1], p + at, size - at, depth)
    return out.put_u8(c']')


cdef int split_properties(bytes props, Part *parts) except -1:
    """Find each property by its flag bit; absent ones have no pointer. Lengths are checked here, tables are not."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(props)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(props), at = 2, length
    cdef uint16_t flags
    cdef int bit
    memset(parts, 0, 16 * sizeof(Part))
    need(2, size)
    flags = load_u16(p)
    for bit in range(15, 1, -1):
        if not flags & (1 << bit):
            continue
        if bit == HEADERS:
            need(4, size - at)
            length = load_u32(p + at)
            at += 4
        elif bit == DELIVERY_MODE or bit == PRIORITY:
            length = 1
        elif bit == TIMESTAMP:
            length = 8
        else:
            need(1, size - at)
            length = p[at]
            at += 1
        need(length, size - at)
        parts[bit].p = p + at
        parts[bit].size = length
        at += length
    return 0


cdef int put_or_null(Writer out, Part part) except -1:
    if part.p == NULL:
        return out.put(b"null", 4)
    return put_text(out, part.p, part.size)


cdef int put_property(Writer out, str name, Part part) except -1:
    if part.p == NULL:
        return 0
    put_ascii(out, name)
    put_text(out, part.p, part.size)
    return out.put(b", ", 2)


cdef Writer scratch = Writer()     # nobody else's code runs before its bytes are taken
cdef Writer scratch_command = Writer()


def encode_envelope(str exchange, str routing_key, bytes props, bytes body, str delivery_tag) -> bytes:
    """Return the message with these properties as kombu would write it, under a delivery tag of its own.
    Raises EncodeError for properties that are malformed or have no form in JSON."""
    put_envelope(scratch, exchange, routing_key, props, body, delivery_tag)
    return scratch.take()


def encode_push(str place, Message message, str delivery_tag) -> bytes:
    """Return the packed command that puts a message in front of a Redis list, as kombu would write it.
    Raises EncodeError as ``encode_envelope`` does."""
    cdef Writer out = scratch_command
    cdef Py_ssize_t size
    cdef const char *name = PyUnicode_AsUTF8AndSize(place, &size)
    put_envelope(scratch, message.exchange, message.routing_key, message.props, message.body, delivery_tag)
    out.clear()
    out.put(b"*3\r\n$5\r\nLPUSH\r\n$", 16)
    put_integer(out, size)
    out.put(b"\r\n", 2)
    out.put(name, size)
    out.put(b"\r\n$", 3)
    put_integer(out, scratch.size)
    out.put(b"\r\n", 2)
    out.put(scratch.data, scratch.size)
    out.put(b"\r\n", 2)
    scratch.clear()
    return out.take()


cdef int put_envelope(Writer out, str exchange, str routing_key, bytes props, bytes body, str delivery_tag) except -1:
    cdef Part parts[16]
    cdef bytes text = b2a_base64(body, newline=False)
    out.clear()
    split_properties(props, parts)
    out.put(b'{"body": "', 10)
    out.put_bytes(text)
    out.put(b'", "content-encoding": ', 23)
    put_or_null(out, parts[CONTENT_ENCODING])
    out.put(b', "content-type": ', 18)
    put_or_null(out, parts[CONTENT_TYPE])
    out.put(b', "headers": ', 13)
    put_table(out, parts[HEADERS].p, parts[HEADERS].size, 1)
    out.put(b', "properties": {', 17)
    put_property(out, '"correlation_id": ', parts[CORRELATION_ID])
    if parts[REPLY_TO].p == NULL:
        out.put(b'"reply_to": "", ', 16)    # Celery's form of "nowhere"
    put_property(out, '"reply_to": ', parts[REPLY_TO])
    put_property(out, '"message_id": ', parts[MESSAGE_ID])
    put_property(out, '"type": ', parts[TYPE])
    put_property(out, '"user_id": ', parts[USER_ID])
    put_property(out, '"app_id": ', parts[APP_ID])
    put_property(out, '"cluster_id": ', parts[CLUSTER_ID])
    if parts[TIMESTAMP].p != NULL:
        put_ascii(out, f'"timestamp": {load_u64(parts[TIMESTAMP].p)}, ')
    if parts[DELIVERY_MODE].p != NULL:
        put_ascii(out, '"delivery_mode": 1, ' if parts[DELIVERY_MODE].p[0] == 1 else '"delivery_mode": 2, ')
    put_property(out, '"expiration": ', parts[EXPIRATION])
    out.put(b'"delivery_info": {"exchange": ', 30)
    put_str(out, exchange)
    out.put(b', "routing_key": ', 17)
    put_str(out, routing_key)
    out.put(b'}, "priority": ', 15)
    put_integer(out, 0 if parts[PRIORITY].p == NULL else parts[PRIORITY].p[0])
    out.put(b', "body_encoding": "base64", "delivery_tag": ', 45)
    put_str(out, delivery_tag)
    return out.put(b"}}", 2)


# --- reading ----------------------------------------------------------------------------------------------------------

cdef str short_text(dict properties, str name):
    """A property that is a short text, None when it is absent, empty or cannot be one: nothing depends on those."""
    value = properties.get(name)
    if type(value) is str and 0 < len(<str> value) <= 63:
        return <str> value
    if type(value) is str and value and len((<str> value).encode("utf-8", "surrogatepass")) <= 255:
        return <str> value
    return None


cdef object small_number(dict properties, str name):
    """A property that is one byte; None when it is absent or no number. kombu, too, cuts priorities to their range."""
    value = properties.get(name)
    if type(value) is not int:
        return None
    return 0 if value < 0 else 255 if value > 255 else value


cdef bytes read_body(dict envelope, dict properties):
    body = envelope.get("body")
    encoding = properties.get("body_encoding")
    if type(body) is not str:
        raise DecodeError(f"the body of a message is {type(body).__name__}; expected text")
    if encoding == "base64":
        return a2b_base64(body)
    if encoding is None or encoding == "utf-8":
        return (<str> body).encode("utf-8", "surrogatepass")
    raise DecodeError(f"unknown body_encoding {encoding!r:.80}; known: base64, utf-8")


cdef dict member(dict owner, str name):
    value = owner.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise DecodeError(f"{name} of a message is {type(value).__name__}; expected an object")
    return <dict> value


cdef str text_member(dict envelope, str name):
    value = envelope.get(name)
    if value is not None and type(value) is not str:
        raise DecodeError(f"{name} of a message is {type(value).__name__}; expected text")
    return value


cdef int count_deliveries(dict headers) except -1:
    """How often the message has been handed out, this time included."""
    count = headers.get(DELIVERY_COUNT)
    if type(count) is int and 0 < count < 1000000:
        return <int> count + 1
    return 2 if headers.get("redelivered") is True else 1


cdef tuple route_of(dict properties, bytes queue):
    """Exchange and routing key as the sender gave them, if there is more to say than the queue's name; else nothing."""
    info = properties.get("delivery_info")
    if type(info) is not dict:
        return ()
    exchange, routing_key = (<dict> info).get("exchange"), (<dict> info).get("routing_key")
    if type(exchange) is not str or type(routing_key) is not str:
        return ()
    if len(<str> exchange) > 255 or len(<str> routing_key) > 255:
        return ()   # no AMQP client could have sent it there
    route = (<str> exchange).encode("utf-8", "replace"), (<str> routing_key).encode("utf-8", "replace")
    return () if route == (b"", queue) else route


cdef Py_ssize_t outside_of_strings(bytes raw) noexcept:
    """How many bytes of a JSON text are not in a string."""
    cdef const char *p = PyBytes_AS_STRING(raw)
    cdef const char *end = p + PyBytes_GET_SIZE(raw)
    cdef const char *begin
    cdef Py_ssize_t found = 0
    while True:
        begin = p
        p = <const char *> memchr(p, c'"', end - p)
        if p == NULL:
            return found + (end - begin)
        found += p - begin + 2
        p += 1
        while p < end and p[0] != c'"':
            p += 2 if p[0] == c'\\' else 1
        if p >= end:
            return found
        p += 1


def is_bounded(bytes raw) -> bool:
    """Whether so little of a JSON text is outside of strings that it may be read."""
    return PyBytes_GET_SIZE(raw) <= MAX_OTHER_BYTES or outside_of_strings(raw) <= MAX_OTHER_BYTES


cdef object load(bytes raw):
    """What a JSON text says, as the json module reads it; orjson takes most of them. Raises ValueError.

    NaN, 1e400 and lone surrogates, for which the json module is asked, are looked for in what is not the body alone:
    no message costs more by it than MAX_ODD_BYTES do.
    """
    if not is_bounded(raw):
        raise ValueError("more than 4 MiB of it is not text")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        reason = error
    found = BODY.search(raw) if PyBytes_GET_SIZE(raw) > MAX_ODD_BYTES else None
    text = raw if found is None else raw[:found.start(1)] + raw[found.end(1):]
    if PyBytes_GET_SIZE(text) > MAX_ODD_BYTES:
        raise reason
    try:
        loaded = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if found is not None:
        if type(loaded) is not dict or loaded.get("body") != "":
            raise reason    # it was not the body
        loaded["body"] = found[1].decode("utf-8")
    return loaded


cdef tuple read(bytes raw, bytes queue):
    cdef dict headers, properties, envelope
    cdef bytes body
    try:
        loaded = load(raw)
        if type(loaded) is not dict:
            raise DecodeError(f"a message is {type(loaded).__name__}; expected an object with a body")
        envelope = <dict> loaded
        headers = member(envelope, "headers")
        properties = member(envelope, "properties")
        body = read_body(envelope, properties)
        props = encode_properties({
            "content_type": text_member(envelope, "content-type"),
            "content_encoding": text_member(envelope, "content-encoding"),
            "headers": headers,
            "delivery_mode": small_number(properties, "delivery_mode"),
            "priority": small_number(properties, "priority"),
            "correlation_id": short_text(properties, "correlation_id"),
            "reply_to": short_text(properties, "reply_to"),
            "expiration": short_text(properties, "expiration"),
            "message_id": short_text(properties, "message_id"),
            "type": short_text(properties, "type"),
            "user_id": short_text(properties, "user_id"),
            "app_id": short_text(properties, "app_id"),
            "cluster_id": short_text(properties, "cluster_id"),
        })
    except (ValueError, EncodeError) as error:
        # The errors of both readers, of base64 and of text are ValueErrors.
        raise DecodeError(f"a message in the queue is not what kombu writes: {error}") from None
    return props, body, count_deliveries(headers), route_of(properties, queue)


def decode_envelope(bytes raw) -> tuple[bytes, bytes, int]:
    """Return properties, body, and how often the message has been handed out, this time included.
    Raises DecodeError for whatever is no such message."""
    return read(raw, b"")[:3]


def decode_claim(list reply, list queues, uint64_t tag, Py_ssize_t max_bytes) -> list[tuple[object, ...]]:
    """Return the deliveries of a claim as ``BatchSource.receive`` takes them, tags counted from ``tag``; with exchange and
    routing key where the sender gave others than the queue's.

    ``reply`` alternates the number of a queue and the list of its messages. A message that cannot be read, or is longer
    than ``max_bytes``, comes with empty properties, which the core refuses, and the beginning of its text.
    """
    cdef list rows = [], messages
    cdef Py_ssize_t i
    cdef bytes raw
    for i in range(0, len(reply), 2):
        queue = queues[reply[i]]
        messages = reply[i + 1]
        for raw in messages:
            try:
                if PyBytes_GET_SIZE(raw) > max_bytes:
                    raise DecodeError("too long")
                props, body, deliveries, route = read(raw, queue)
                rows.append((tag, queue, props, body, deliveries, *route))
            except DecodeError:
                rows.append((tag, queue, b"", raw[:SAMPLE_BYTES], 1))
            tag += 1
    return rows
