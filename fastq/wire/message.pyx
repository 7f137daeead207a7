# cython: language_level=3, cdivision=True
"""Task messages, protocol 2, on their way out: encode them as AMQP 0-9-1 basic properties and a body.

No sockets; the clock is read for ``expiration``. Source: specification 4.2.5 and 1.8.3.1; Celery's protocol 2.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq.wire.buffer cimport Writer, store_u16, store_u32
from fastq.wire.dates cimport format_iso8601, read_clock
from fastq.wire.properties cimport (
    HAS_APP_ID, HAS_CLUSTER_ID, HAS_CONTENT_ENCODING, HAS_CONTENT_TYPE, HAS_CORRELATION_ID, HAS_DELIVERY_MODE,
    HAS_EXPIRATION, HAS_HEADERS, HAS_MESSAGE_ID, HAS_PRIORITY, HAS_REPLY_TO, HAS_TIMESTAMP, HAS_TYPE, HAS_USER_ID)

from fastq.errors import EncodeError

cdef enum:
    MAX_DEPTH = 32      # specified: reliability rules, section 6.1


@cython.no_gc   # text, bytes and numbers make no circles; of a batch there are thousands
cdef class Message:
    """A message on its way out: where to, encoded basic properties, body; and what embedded brokers sort by."""

    def __init__(self, str exchange, str routing_key, bytes props, bytes body, str id="", int priority=0,
                 due: float | None = None, expires: float | None = None):
        self.exchange = exchange
        self.routing_key = routing_key
        self.props = props
        self.body = body
        self.id = id
        self.priority = priority
        self.due = due
        self.expires = expires

    def __repr__(self):
        return f"<Message {self.id or '?'} to {self.exchange!r}/{self.routing_key!r}, {len(self.body)} bytes>"


cdef int put_shortstr(Writer out, str text) except -1:
    cdef Py_ssize_t size
    cdef bytes kept = None
    cdef const char *data
    try:
        data = PyUnicode_AsUTF8AndSize(text, &size)
    except UnicodeEncodeError:
        kept = text.encode("utf-8", "surrogatepass")
        data, size = PyBytes_AS_STRING(kept), PyBytes_GET_SIZE(kept)
    if size > 255:
        raise EncodeError(f"text too long for an AMQP short string ({size} bytes, at most 255): {text[:60]!r}…")
    out.put_u8(<uint8_t> size)
    return out.put(data, size)


cdef int put_key(Writer out, const char *key, Py_ssize_t size) except -1:
    out.put_u8(<uint8_t> size)
    return out.put(key, size)


cdef int put_text(Writer out, str text) except -1:
    """A long string value, or void for None. Lone surrogates are written as py-amqp writes them."""
    cdef Py_ssize_t size
    cdef bytes kept = None
    cdef const char *data
    if text is None:
        return out.put_u8(c'V')
    try:
        data = PyUnicode_AsUTF8AndSize(text, &size)
    except UnicodeEncodeError:
        kept = text.encode("utf-8", "surrogatepass")
        data, size = PyBytes_AS_STRING(kept), PyBytes_GET_SIZE(kept)
    out.put_u8(c'S')
    out.put_u32(<uint32_t> size)
    return out.put(data, size)


cdef int put_int(Writer out, int64_t value) except -1:
    if -2147483648 <= value <= 2147483647:
        out.put_u8(c'I')
        return out.put_u32(<uint32_t> <int> value)
    out.put_u8(c'l')
    return out.put_u64(<uint64_t> value)


cdef int put_value(Writer out, object value, int depth) except -1:
    """Any value that a field table holds; EncodeError names what it cannot."""
    cdef Py_ssize_t start
    if depth > 32:
        raise EncodeError("message headers are nested deeper than 32 levels")
    if value is None:
        out.put_u8(c'V')
    elif value is True or value is False:
        out.put_u8(c't')
        out.put_u8(1 if value else 0)
    elif isinstance(value, str):
        put_text(out, value if type(value) is str else str.__str__(value))
    elif isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise EncodeError(f"message header integer beyond 64 bits: {value}")
        put_int(out, value)
    elif isinstance(value, float):
        out.put_u8(c'd')
        out.put_double(value)
    elif isinstance(value, (bytes, bytearray)):
        out.put_u8(c'x')
        out.put_u32(<uint32_t> len(value))
        out.put(<const char *> PyBytes_AS_STRING(bytes(value)), len(value))
    elif isinstance(value, dict):
        out.put_u8(c'F')
        put_table(out, value, depth + 1)
    elif isinstance(value, (list, tuple)):
        out.put_u8(c'A')
        start = out.size
        out.put_u32(0)
        for item in value:
            put_value(out, item, depth + 1)
        store_u32(out.data + start, <uint32_t> (out.size - start - 4))
    else:
        raise EncodeError(f"message header of type {type(value).__name__} has no AMQP form: {value!r:.80}")
    return 0


cdef int put_table(Writer out, dict table, int depth) except -1:
    cdef Py_ssize_t start = out.size
    out.put_u32(0)
    for key, value in table.items():
        put_shortstr(out, key if type(key) is str else str(key))
        put_value(out, value, depth)
    store_u32(out.data + start, <uint32_t> (out.size - start - 4))
    return 0


cdef Writer scratch = Writer()


cdef class TaskTemplate:
    """The messages of one task (protocol 2, Celery's headers in Celery's order), encoded but for what differs by call.

    ``eta`` and ``expires`` are unix seconds. Raises EncodeError for a value that AMQP properties cannot hold.
    """

    cdef str exchange
    cdef str routing_key
    cdef str reply_to
    cdef int priority
    cdef object eta
    cdef object expires
    cdef bytes until_id         # from the flags to the value of the header "id"
    cdef bytes until_root_id
    cdef bytes since_origin     # to the end of the headers
    cdef bytes octets           # delivery mode and priority
    cdef Py_ssize_t table       # where the headers begin

    def __init__(
        self, str name, *, str exchange="", str routing_key="celery", str content_type="application/json",
        str content_encoding="utf-8", eta: float | None = None, expires: float | None = None, int retries=0,
        time_limit: float | None = None, soft_time_limit: float | None = None, str group=None,
        group_index: int | None = None, str shadow=None, bint ignore_result=False, str reply_to=None,
        priority: int | None = None, int delivery_mode=2, str compression=None, str origin="", dict headers=None,
    ):
        cdef Writer out = Writer()
        cdef uint16_t flags = (HAS_CONTENT_TYPE | HAS_CONTENT_ENCODING | HAS_HEADERS | HAS_DELIVERY_MODE | HAS_PRIORITY
                               | HAS_CORRELATION_ID)
        cdef Py_ssize_t start
        if priority is not None and not 0 <= priority <= 255:
            raise EncodeError(f"priority {priority!r} is not between 0 and 255")
        if reply_to is not None:
            flags |= HAS_REPLY_TO
        if expires is not None:
            flags |= HAS_EXPIRATION
        self.exchange, self.routing_key, self.reply_to = exchange, routing_key, reply_to
        self.priority = 0 if priority is None else priority
        self.eta, self.expires = eta, expires

        out.put_u16(flags)
        put_shortstr(out, content_type)
        put_shortstr(out, content_encoding)
        self.table = out.size
        out.put_u32(0)
        put_key(out, b"lang", 4)
        put_text(out, "py")
        put_key(out, b"task", 4)
        put_text(out, name)
        put_key(out, b"id", 2)
        self.until_id = out.take()

        put_key(out, b"shadow", 6)
        put_text(out, shadow)
        put_key(out, b"eta", 3)
        put_text(out, None if eta is None else format_iso8601(eta).decode("ascii"))
        put_key(out, b"expires", 7)
        put_text(out, None if expires is None else format_iso8601(expires).decode("ascii"))
        put_key(out, b"group", 5)
        put_text(out, group)
        put_key(out, b"group_index", 11)
        put_value(out, group_index, 0)
        put_key(out, b"retries", 7)
        put_int(out, retries)
        put_key(out, b"timelimit", 9)
        out.put_u8(c'A')
        start = out.size
        out.put_u32(0)
        put_value(out, time_limit, 0)
        put_value(out, soft_time_limit, 0)
        store_u32(out.data + start, <uint32_t> (out.size - start - 4))
        put_key(out, b"root_id", 7)
        self.until_root_id = out.take()

        put_key(out, b"origin", 6)
        put_text(out, origin)
        put_key(out, b"ignore_result", 13)
        put_value(out, ignore_result, 0)
        put_key(out, b"replaced_task_nesting", 21)
        put_int(out, 0)
        put_key(out, b"stamped_headers", 15)
        put_text(out, None)
        put_key(out, b"stamps", 6)
        put_value(out, {}, 0)
        if compression is not None:
            put_key(out, b"compression", 11)
            put_text(out, compression)
        if headers is not None:
            for key, value in headers.items():
                put_shortstr(out, key if type(key) is str else str(key))
                put_value(out, value, 1)
        self.since_origin = out.take()

        out.put_u8(<uint8_t> delivery_mode)
        out.put_u8(<uint8_t> self.priority)
        self.octets = out.take()

    def message(self, str task_id not None, bytes body not None, str argsrepr="()", str kwargsrepr="{}", str root_id=None,
                str parent_id=None) -> Message:
        """Return the message of one call. Without a ``root_id`` it is the first of its family. Raises EncodeError."""
        cdef Writer out = scratch   # nobody else's code runs before its bytes are taken
        cdef double left
        out.size = 0
        out.put_bytes(self.until_id)
        put_text(out, task_id)
        out.put_bytes(self.until_root_id)
        put_text(out, task_id if root_id is None else root_id)
        put_key(out, b"parent_id", 9)
        put_text(out, parent_id)
        put_key(out, b"argsrepr", 8)
        put_text(out, argsrepr)
        put_key(out, b"kwargsrepr", 10)
        put_text(out, kwargsrepr)
        out.put_bytes(self.since_origin)
        store_u32(out.data + self.table, <uint32_t> (out.size - self.table - 4))
        out.put_bytes(self.octets)
        put_shortstr(out, task_id)
        if self.reply_to is not None:
            put_shortstr(out, self.reply_to)
        if self.expires is not None:
            left = (<double> self.expires - read_clock()) * 1000
            put_shortstr(out, str(int(left) if left > 0 else 0))
        # Field by field: to pass eight arguments takes as long as the rest.
        cdef Message made = Message.__new__(Message)
        made.exchange, made.routing_key, made.id, made.body = self.exchange, self.routing_key, task_id, body
        made.priority, made.due, made.expires = self.priority, self.eta, self.expires
        made.props = out.take()
        return made


def encode_task(name, task_id, body, *, argsrepr="()", kwargsrepr="{}", root_id=None, parent_id=None, **fixed) -> Message:
    """Return a task message: that of a TaskTemplate with the ``fixed`` fields, which are not kept. Raises EncodeError."""
    return TaskTemplate(name, **fixed).message(task_id, body, argsrepr, kwargsrepr, root_id, parent_id)


cdef bytes encode_result_properties(const char *task_id, Py_ssize_t size):
    """Properties of a result message in the format of Celery's ``rpc://`` store: transient JSON, correlated by task id."""
    cdef Writer out = scratch
    out.size = 0
    out.put_u16(HAS_CONTENT_TYPE | HAS_CONTENT_ENCODING | HAS_HEADERS | HAS_DELIVERY_MODE | HAS_PRIORITY | HAS_CORRELATION_ID)
    put_shortstr(out, "application/json")
    put_shortstr(out, "utf-8")
    out.put_u32(0)
    out.put_u8(1)
    out.put_u8(0)
    out.put_u8(<uint8_t> (size if size <= 255 else 255))
    out.put(task_id, size if size <= 255 else 255)
    return out.take()


cdef dict SHORT_FIELDS = {
    "content_type": HAS_CONTENT_TYPE, "content_encoding": HAS_CONTENT_ENCODING, "correlation_id": HAS_CORRELATION_ID,
    "reply_to": HAS_REPLY_TO, "expiration": HAS_EXPIRATION, "message_id": HAS_MESSAGE_ID, "type": HAS_TYPE,
    "user_id": HAS_USER_ID, "app_id": HAS_APP_ID, "cluster_id": HAS_CLUSTER_ID,
}


def encode_properties(dict properties) -> bytes:
    """Return basic properties encoded for a content header. Keys as in ``wire.properties``; None means absent."""
    cdef Writer out = Writer()
    cdef uint16_t flags = 0
    out.put_u16(0)
    for name in ("content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to",
                 "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "cluster_id"):
        value = properties.get(name)
        if value is None:
            continue
        if name == "headers":
            flags |= HAS_HEADERS
            put_table(out, value, 1)
        elif name == "delivery_mode" or name == "priority":
            flags |= HAS_DELIVERY_MODE if name == "delivery_mode" else HAS_PRIORITY
            out.put_u8(value)
        elif name == "timestamp":
            flags |= HAS_TIMESTAMP
            out.put_u64(int(value))
        else:
            flags |= <int> SHORT_FIELDS[name]
            put_shortstr(out, value)
    store_u16(out.data, flags)
    return out.take()
