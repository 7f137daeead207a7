# cython: language_level=3
"""AMQP 0-9-1 methods, basic properties and field tables: bytes to values and back, by librabbitmq. No frames, no I/O.

Cold path only: ``link`` scans deliveries in place, ``wire.message`` writes task headers; tests hold both against this
module. Source: AMQP 0-9-1 specification, sections 4.2.5 and 1.3 to 1.8; RabbitMQ's errata for the types of fields.

librabbitmq trusts the nesting of its input (it recurses as deep as the bytes say), so ``check_*`` here walk every byte
first: all sizes lie inside their container, all types are known, tables and arrays are nested at most 32 deep.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from fastq.wire.buffer cimport load_u16, load_u32

from datetime import datetime, timezone
from decimal import Decimal

from fastq.errors import EncodeError, LocalProtocolError, RemoteProtocolError

cdef extern from "amqp.h":
    ctypedef int amqp_boolean_t

    ctypedef struct amqp_bytes_t:
        size_t len
        void *bytes

    ctypedef struct amqp_decimal_t:
        uint8_t decimals
        uint32_t value

    ctypedef struct amqp_table_t:
        int num_entries
        amqp_table_entry_t *entries

    ctypedef struct amqp_array_t:
        int num_entries
        amqp_field_value_t *entries

    # Without a name in C; only its members are ever written out.
    ctypedef union amqp_any_value:
        amqp_boolean_t boolean
        int8_t i8
        uint8_t u8
        int16_t i16
        uint16_t u16
        int32_t i32
        uint32_t u32
        int64_t i64
        uint64_t u64
        float f32
        double f64
        amqp_decimal_t decimal
        amqp_bytes_t bytes
        amqp_table_t table
        amqp_array_t array

    ctypedef struct amqp_field_value_t:
        uint8_t kind
        amqp_any_value value

    ctypedef struct amqp_table_entry_t:
        amqp_bytes_t key
        amqp_field_value_t value

    ctypedef struct amqp_pool_t:
        pass

    void init_amqp_pool(amqp_pool_t *pool, size_t pagesize)
    void empty_amqp_pool(amqp_pool_t *pool)
    void *amqp_pool_alloc(amqp_pool_t *pool, size_t amount)
    const char *amqp_error_string2(int err)
    int amqp_encode_table(amqp_bytes_t encoded, amqp_table_t *value, size_t *offset)
    int amqp_decode_table(amqp_bytes_t encoded, amqp_pool_t *pool, amqp_table_t *output, size_t *offset)

cdef extern from "amqp_framing.h":
    enum: AMQP_BASIC_CLASS
    int amqp_decode_method(uint32_t method, amqp_pool_t *pool, amqp_bytes_t encoded, void **decoded)
    int amqp_encode_method(uint32_t method, void *decoded, amqp_bytes_t encoded)
    int amqp_decode_properties(uint16_t class_id, amqp_pool_t *pool, amqp_bytes_t encoded, void **decoded)
    int amqp_encode_properties(uint16_t class_id, void *decoded, amqp_bytes_t encoded)

# A row per method: the fields in wire order, which is also the order in librabbitmq's struct. Kinds: 1 2 4 8 = unsigned
# integer of that many bytes, b = bit (neighbours share an octet), s, S = short, long string, T = table, r = reserved.
cdef extern from *:
    """
    #include <stddef.h>
    typedef struct { const char *name; char kind; size_t offset; } fastq_field;
    typedef struct { unsigned int id; const char *name; size_t size; int count; fastq_field fields[14]; } fastq_shape;

    #define NAMED(type, field, name, kind) {name, kind, offsetof(amqp_##type##_t, field)}
    #define FIELD(type, field, kind) NAMED(type, field, #field, kind)
    #define METHOD(constant, type, name, count, ...) \
        {AMQP_##constant##_METHOD, name, sizeof(amqp_##type##_t), count, {__VA_ARGS__}}
    #define EMPTY(constant, type, name) {AMQP_##constant##_METHOD, name, sizeof(amqp_##type##_t), 0, {{0}}}

    static const fastq_shape fastq_methods[] = {
        METHOD(CONNECTION_START, connection_start, "connection.start", 5,
            FIELD(connection_start, version_major, '1'), FIELD(connection_start, version_minor, '1'),
            FIELD(connection_start, server_properties, 'T'), FIELD(connection_start, mechanisms, 'S'),
            FIELD(connection_start, locales, 'S')),
        METHOD(CONNECTION_START_OK, connection_start_ok, "connection.start-ok", 4,
            FIELD(connection_start_ok, client_properties, 'T'), FIELD(connection_start_ok, mechanism, 's'),
            FIELD(connection_start_ok, response, 'S'), FIELD(connection_start_ok, locale, 's')),
        METHOD(CONNECTION_SECURE, connection_secure, "connection.secure", 1, FIELD(connection_secure, challenge, 'S')),
        METHOD(CONNECTION_SECURE_OK, connection_secure_ok, "connection.secure-ok", 1,
            FIELD(connection_secure_ok, response, 'S')),
        METHOD(CONNECTION_TUNE, connection_tune, "connection.tune", 3, FIELD(connection_tune, channel_max, '2'),
            FIELD(connection_tune, frame_max, '4'), FIELD(connection_tune, heartbeat, '2')),
        METHOD(CONNECTION_TUNE_OK, connection_tune_ok, "connection.tune-ok", 3,
            FIELD(connection_tune_ok, channel_max, '2'),
            FIELD(connection_tune_ok, frame_max, '4'), FIELD(connection_tune_ok, heartbeat, '2')),
        METHOD(CONNECTION_OPEN, connection_open, "connection.open", 3, FIELD(connection_open, virtual_host, 's'),
            FIELD(connection_open, capabilities, 's'), FIELD(connection_open, insist, 'b')),
        METHOD(CONNECTION_OPEN_OK, connection_open_ok, "connection.open-ok", 1,
            FIELD(connection_open_ok, known_hosts, 's')),
        METHOD(CONNECTION_CLOSE, connection_close, "connection.close", 4, FIELD(connection_close, reply_code, '2'),
            FIELD(connection_close, reply_text, 's'), FIELD(connection_close, class_id, '2'),
            FIELD(connection_close, method_id, '2')),
        EMPTY(CONNECTION_CLOSE_OK, connection_close_ok, "connection.close-ok"),
        METHOD(CONNECTION_BLOCKED, connection_blocked, "connection.blocked", 1, FIELD(connection_blocked, reason, 's')),
        EMPTY(CONNECTION_UNBLOCKED, connection_unblocked, "connection.unblocked"),

        METHOD(CHANNEL_OPEN, channel_open, "channel.open", 1, FIELD(channel_open, out_of_band, 's')),
        METHOD(CHANNEL_OPEN_OK, channel_open_ok, "channel.open-ok", 1, FIELD(channel_open_ok, channel_id, 'S')),
        METHOD(CHANNEL_FLOW, channel_flow, "channel.flow", 1, FIELD(channel_flow, active, 'b')),
        METHOD(CHANNEL_FLOW_OK, channel_flow_ok, "channel.flow-ok", 1, FIELD(channel_flow_ok, active, 'b')),
        METHOD(CHANNEL_CLOSE, channel_close, "channel.close", 4, FIELD(channel_close, reply_code, '2'),
            FIELD(channel_close, reply_text, 's'), FIELD(channel_close, class_id, '2'),
            FIELD(channel_close, method_id, '2')),
        EMPTY(CHANNEL_CLOSE_OK, channel_close_ok, "channel.close-ok"),

        METHOD(EXCHANGE_DECLARE, exchange_declare, "exchange.declare", 9, FIELD(exchange_declare, ticket, 'r'),
            FIELD(exchange_declare, exchange, 's'), FIELD(exchange_declare, type, 's'),
            FIELD(exchange_declare, passive, 'b'),
            FIELD(exchange_declare, durable, 'b'), FIELD(exchange_declare, auto_delete, 'b'),
            FIELD(exchange_declare, internal, 'b'), FIELD(exchange_declare, nowait, 'b'),
            FIELD(exchange_declare, arguments, 'T')),
        EMPTY(EXCHANGE_DECLARE_OK, exchange_declare_ok, "exchange.declare-ok"),
        METHOD(EXCHANGE_DELETE, exchange_delete, "exchange.delete", 4, FIELD(exchange_delete, ticket, 'r'),
            FIELD(exchange_delete, exchange, 's'), FIELD(exchange_delete, if_unused, 'b'),
            FIELD(exchange_delete, nowait, 'b')),
        EMPTY(EXCHANGE_DELETE_OK, exchange_delete_ok, "exchange.delete-ok"),
        METHOD(EXCHANGE_BIND, exchange_bind, "exchange.bind", 6, FIELD(exchange_bind, ticket, 'r'),
            FIELD(exchange_bind, destination, 's'), FIELD(exchange_bind, source, 's'),
            FIELD(exchange_bind, routing_key, 's'), FIELD(exchange_bind, nowait, 'b'),
            FIELD(exchange_bind, arguments, 'T')),
        EMPTY(EXCHANGE_BIND_OK, exchange_bind_ok, "exchange.bind-ok"),

        METHOD(QUEUE_DECLARE, queue_declare, "queue.declare", 8, FIELD(queue_declare, ticket, 'r'),
            FIELD(queue_declare, queue, 's'), FIELD(queue_declare, passive, 'b'), FIELD(queue_declare, durable, 'b'),
            FIELD(queue_declare, exclusive, 'b'), FIELD(queue_declare, auto_delete, 'b'),
            FIELD(queue_declare, nowait, 'b'),
            FIELD(queue_declare, arguments, 'T')),
        METHOD(QUEUE_DECLARE_OK, queue_declare_ok, "queue.declare-ok", 3, FIELD(queue_declare_ok, queue, 's'),
            FIELD(queue_declare_ok, message_count, '4'), FIELD(queue_declare_ok, consumer_count, '4')),
        METHOD(QUEUE_BIND, queue_bind, "queue.bind", 6, FIELD(queue_bind, ticket, 'r'), FIELD(queue_bind, queue, 's'),
            FIELD(queue_bind, exchange, 's'), FIELD(queue_bind, routing_key, 's'), FIELD(queue_bind, nowait, 'b'),
            FIELD(queue_bind, arguments, 'T')),
        EMPTY(QUEUE_BIND_OK, queue_bind_ok, "queue.bind-ok"),
        METHOD(QUEUE_PURGE, queue_purge, "queue.purge", 3, FIELD(queue_purge, ticket, 'r'),
            FIELD(queue_purge, queue, 's'),
            FIELD(queue_purge, nowait, 'b')),
        METHOD(QUEUE_PURGE_OK, queue_purge_ok, "queue.purge-ok", 1, FIELD(queue_purge_ok, message_count, '4')),
        METHOD(QUEUE_DELETE, queue_delete, "queue.delete", 5, FIELD(queue_delete, ticket, 'r'),
            FIELD(queue_delete, queue, 's'), FIELD(queue_delete, if_unused, 'b'), FIELD(queue_delete, if_empty, 'b'),
            FIELD(queue_delete, nowait, 'b')),
        METHOD(QUEUE_DELETE_OK, queue_delete_ok, "queue.delete-ok", 1, FIELD(queue_delete_ok, message_count, '4')),

        METHOD(BASIC_QOS, basic_qos, "basic.qos", 3, FIELD(basic_qos, prefetch_size, '4'),
            FIELD(basic_qos, prefetch_count, '2'), NAMED(basic_qos, global, "global_", 'b')),
        EMPTY(BASIC_QOS_OK, basic_qos_ok, "basic.qos-ok"),
        METHOD(BASIC_CONSUME, basic_consume, "basic.consume", 8, FIELD(basic_consume, ticket, 'r'),
            FIELD(basic_consume, queue, 's'), FIELD(basic_consume, consumer_tag, 's'),
            FIELD(basic_consume, no_local, 'b'),
            FIELD(basic_consume, no_ack, 'b'), FIELD(basic_consume, exclusive, 'b'), FIELD(basic_consume, nowait, 'b'),
            FIELD(basic_consume, arguments, 'T')),
        METHOD(BASIC_CONSUME_OK, basic_consume_ok, "basic.consume-ok", 1, FIELD(basic_consume_ok, consumer_tag, 's')),
        METHOD(BASIC_CANCEL, basic_cancel, "basic.cancel", 2, FIELD(basic_cancel, consumer_tag, 's'),
            FIELD(basic_cancel, nowait, 'b')),
        METHOD(BASIC_CANCEL_OK, basic_cancel_ok, "basic.cancel-ok", 1, FIELD(basic_cancel_ok, consumer_tag, 's')),
        METHOD(BASIC_PUBLISH, basic_publish, "basic.publish", 5, FIELD(basic_publish, ticket, 'r'),
            FIELD(basic_publish, exchange, 's'), FIELD(basic_publish, routing_key, 's'),
            FIELD(basic_publish, mandatory, 'b'), FIELD(basic_publish, immediate, 'b')),
        METHOD(BASIC_RETURN, basic_return, "basic.return", 4, FIELD(basic_return, reply_code, '2'),
            FIELD(basic_return, reply_text, 's'), FIELD(basic_return, exchange, 's'),
            FIELD(basic_return, routing_key, 's')),
        METHOD(BASIC_DELIVER, basic_deliver, "basic.deliver", 5, FIELD(basic_deliver, consumer_tag, 's'),
            FIELD(basic_deliver, delivery_tag, '8'), FIELD(basic_deliver, redelivered, 'b'),
            FIELD(basic_deliver, exchange, 's'), FIELD(basic_deliver, routing_key, 's')),
        METHOD(BASIC_GET, basic_get, "basic.get", 3, FIELD(basic_get, ticket, 'r'), FIELD(basic_get, queue, 's'),
            FIELD(basic_get, no_ack, 'b')),
        METHOD(BASIC_GET_OK, basic_get_ok, "basic.get-ok", 5, FIELD(basic_get_ok, delivery_tag, '8'),
            FIELD(basic_get_ok, redelivered, 'b'), FIELD(basic_get_ok, exchange, 's'),
            FIELD(basic_get_ok, routing_key, 's'),
            FIELD(basic_get_ok, message_count, '4')),
        METHOD(BASIC_GET_EMPTY, basic_get_empty, "basic.get-empty", 1, FIELD(basic_get_empty, cluster_id, 's')),
        METHOD(BASIC_ACK, basic_ack, "basic.ack", 2, FIELD(basic_ack, delivery_tag, '8'),
            FIELD(basic_ack, multiple, 'b')),
        METHOD(BASIC_REJECT, basic_reject, "basic.reject", 2, FIELD(basic_reject, delivery_tag, '8'),
            FIELD(basic_reject, requeue, 'b')),
        METHOD(BASIC_NACK, basic_nack, "basic.nack", 3, FIELD(basic_nack, delivery_tag, '8'),
            FIELD(basic_nack, multiple, 'b'), FIELD(basic_nack, requeue, 'b')),

        METHOD(CONFIRM_SELECT, confirm_select, "confirm.select", 1, FIELD(confirm_select, nowait, 'b')),
        EMPTY(CONFIRM_SELECT_OK, confirm_select_ok, "confirm.select-ok"),
    };

    /* The property at place n is there when bit 15 - n of the flags is set. */
    static const fastq_shape fastq_properties = {0, "basic properties", sizeof(amqp_basic_properties_t), 14, {
        FIELD(basic_properties, content_type, 's'), FIELD(basic_properties, content_encoding, 's'),
        FIELD(basic_properties, headers, 'T'), FIELD(basic_properties, delivery_mode, '1'),
        FIELD(basic_properties, priority, '1'), FIELD(basic_properties, correlation_id, 's'),
        FIELD(basic_properties, reply_to, 's'), FIELD(basic_properties, expiration, 's'),
        FIELD(basic_properties, message_id, 's'), FIELD(basic_properties, timestamp, '8'),
        FIELD(basic_properties, type, 's'), FIELD(basic_properties, user_id, 's'), FIELD(basic_properties, app_id, 's'),
        FIELD(basic_properties, cluster_id, 's')}};

    enum { FASTQ_METHOD_COUNT = sizeof fastq_methods / sizeof fastq_methods[0] };
    """
    ctypedef struct Field "fastq_field":
        const char *name
        char kind
        size_t offset

    ctypedef struct Shape "fastq_shape":
        uint32_t id
        const char *name
        size_t size
        int count
        Field fields[14]

    const Shape methods "fastq_methods"[]
    const Shape properties_shape "fastq_properties"
    enum: METHOD_COUNT "FASTQ_METHOD_COUNT"

cdef enum:
    MAX_DEPTH = 32          # chosen: Celery's own headers nest 3 deep
    MAX_BYTES = 1 << 20     # chosen: 8 of the frames that fastq agrees to; librabbitmq needs up to 50 bytes per byte
    MAX_DATETIME = 253402300799     # 9999-12-31T23:59:59Z

cdef dict SHAPE_PLACES = {methods[place].id: place for place in range(METHOD_COUNT)}

#: Method name to number, ``(class << 16) | method``: ``METHODS["basic.ack"] == 0x003C0050``.
METHODS = {methods[place].name.decode("ascii"): methods[place].id for place in range(METHOD_COUNT)}


@cython.final
cdef class Arena:
    """The memory of one call: librabbitmq's pool, and the bytes objects that its structures point into."""

    cdef amqp_pool_t pool
    cdef list kept
    cdef Py_ssize_t size    # upper bound of what encoding will write

    def __cinit__(self):
        init_amqp_pool(&self.pool, 2048)
        self.kept = []
        self.size = 0

    def __dealloc__(self):
        empty_amqp_pool(&self.pool)

    cdef void *allocate(self, size_t amount) except NULL:
        """Return zeroed memory that lives as long as the arena. ``amount`` is not 0."""
        cdef void *place = amqp_pool_alloc(&self.pool, amount)
        if place == NULL:
            raise MemoryError()
        memset(place, 0, amount)
        return place

    cdef int grow(self, Py_ssize_t amount) except -1:
        """Count bytes to be written. Raises EncodeError beyond MAX_BYTES."""
        self.size += amount
        if self.size > MAX_BYTES:
            raise EncodeError(f"more than {MAX_BYTES} bytes of AMQP fields; send large data in the message's body")
        return 0


# --- walking bytes that are not trusted -------------------------------------------------------------------------------

cdef int fixed_size(uint8_t kind) noexcept nogil:
    """Bytes of a field value of this type; -1 when it has no fixed size or is unknown."""
    if kind == c'V':
        return 0
    if kind == c't' or kind == c'b' or kind == c'B':
        return 1
    if kind == c's' or kind == c'u':
        return 2
    if kind == c'I' or kind == c'i' or kind == c'f':
        return 4
    if kind == c'D':
        return 5
    if kind == c'l' or kind == c'L' or kind == c'd' or kind == c'T':
        return 8
    return -1


cdef Py_ssize_t step(Py_ssize_t at, Py_ssize_t size, Py_ssize_t end) except -1:
    """Return ``at + size``. Raises RemoteProtocolError when that lies behind ``end``."""
    if size > end - at:
        raise RemoteProtocolError(f"AMQP field of {size} bytes where {end - at} are left")
    return at + size


cdef Py_ssize_t check_short(const uint8_t *p, Py_ssize_t at, Py_ssize_t end) except -1:
    """Return where a short string that begins at ``at`` ends. Raises RemoteProtocolError."""
    cdef Py_ssize_t start = step(at, 1, end)
    return step(start, p[at], end)


cdef Py_ssize_t check_long(const uint8_t *p, Py_ssize_t at, Py_ssize_t end) except -1:
    """Return where a long string, table or array that begins at ``at`` ends. Raises RemoteProtocolError."""
    cdef Py_ssize_t start = step(at, 4, end)
    return step(start, load_u32(p + at), end)


cdef Py_ssize_t check_value(const uint8_t *p, Py_ssize_t at, Py_ssize_t end, int depth) except -1:
    """Return where the field value (type octet first) at ``at`` ends. Raises RemoteProtocolError."""
    cdef Py_ssize_t start = step(at, 1, end)
    cdef uint8_t kind = p[at]
    cdef int size = fixed_size(kind)
    if size >= 0:
        return step(start, size, end)
    if kind == c'S' or kind == c'x':
        return check_long(p, start, end)
    if kind == c'F':
        return check_table(p, start, end, depth + 1)
    if kind == c'A':
        return check_array(p, start, end, depth + 1)
    raise RemoteProtocolError(f"unknown AMQP field type 0x{kind:02x}")


cdef Py_ssize_t check_array(const uint8_t *p, Py_ssize_t at, Py_ssize_t end, int depth) except -1:
    """Return where the array at ``at`` ends. Raises RemoteProtocolError."""
    cdef Py_ssize_t limit = check_long(p, at, end)
    if depth > MAX_DEPTH:
        raise RemoteProtocolError(f"AMQP tables nested more than {MAX_DEPTH} deep")
    at += 4
    while at < limit:
        at = check_value(p, at, limit, depth)
    return limit


cdef Py_ssize_t check_table(const uint8_t *p, Py_ssize_t at, Py_ssize_t end, int depth) except -1:
    """Return where the table at ``at`` ends. Raises RemoteProtocolError."""
    cdef Py_ssize_t limit = check_long(p, at, end)
    if depth > MAX_DEPTH:
        raise RemoteProtocolError(f"AMQP tables nested more than {MAX_DEPTH} deep")
    at += 4
    while at < limit:
        at = check_short(p, at, limit)
        at = check_value(p, at, limit, depth)
    return limit


cdef Py_ssize_t check_field(const uint8_t *p, Py_ssize_t at, Py_ssize_t end, char kind) except -1:
    """Return where a method field or property other than a bit ends. Raises RemoteProtocolError."""
    if kind == c's':
        return check_short(p, at, end)
    if kind == c'S':
        return check_long(p, at, end)
    if kind == c'T':
        return check_table(p, at, end, 1)
    return step(at, 2 if kind == c'r' else kind - c'0', end)


cdef int check_method(const uint8_t *p, Py_ssize_t end, const Shape *shape) except -1:
    """Walk a method's arguments. Raises RemoteProtocolError unless they are exactly ``end`` bytes long."""
    cdef Py_ssize_t at = 0
    cdef int place, bits = 0
    for place in range(shape.count):
        if shape.fields[place].kind != c'b':
            bits = 0
            at = check_field(p, at, end, shape.fields[place].kind)
            continue
        if bits % 8 == 0:
            at = step(at, 1, end)
        bits += 1
    return check_end(at, end)


cdef int check_properties(const uint8_t *p, Py_ssize_t end) except -1:
    """Walk encoded properties. Raises RemoteProtocolError unless they are exactly ``end`` bytes long."""
    cdef Py_ssize_t at = step(0, 2, end)
    cdef uint16_t flags = load_u16(p)
    cdef int place
    # The lowest bit announces a second word of flags, which no property of this class needs.
    if flags & 3:
        raise RemoteProtocolError(f"unknown AMQP property flags 0x{flags:04x}")
    for place in range(properties_shape.count):
        if flags & (0x8000 >> place):
            at = check_field(p, at, end, properties_shape.fields[place].kind)
    return check_end(at, end)


cdef int check_end(Py_ssize_t at, Py_ssize_t end) except -1:
    """Raise RemoteProtocolError when bytes are left over."""
    if at != end:
        raise RemoteProtocolError(f"{end - at} bytes too many after the last AMQP field")
    return 0


cdef int check_size(bytes data) except -1:
    """Raise RemoteProtocolError when there is more than librabbitmq shall be given at once."""
    if PyBytes_GET_SIZE(data) > MAX_BYTES:
        raise RemoteProtocolError(f"{PyBytes_GET_SIZE(data)} bytes of AMQP fields; the limit is {MAX_BYTES}")
    return 0


# --- librabbitmq's structures to Python -------------------------------------------------------------------------------

cdef bytes copy_bytes(amqp_bytes_t value):
    return PyBytes_FromStringAndSize(<char *> value.bytes, value.len)


cdef object read_text(amqp_bytes_t value):
    """A string, with lone surrogates as py-amqp writes them; the bytes themselves when they are no text."""
    try:
        return PyUnicode_DecodeUTF8(<char *> value.bytes, value.len, b"surrogatepass") if value.len else ""
    except UnicodeDecodeError:
        return copy_bytes(value)


cdef object read_timestamp(uint64_t seconds):
    """A date in UTC; the number itself when it is beyond the year 9999."""
    return datetime.fromtimestamp(seconds, timezone.utc) if seconds <= <uint64_t> MAX_DATETIME else seconds


cdef object read_value(const amqp_field_value_t *field):
    """A field value. Its type and depth have been checked by ``check_value``."""
    cdef uint8_t kind = field.kind
    cdef int place
    if kind == c'S':
        return read_text(field.value.bytes)
    if kind == c'V':
        return None
    if kind == c't':
        return field.value.boolean != 0
    if kind == c'I':
        return field.value.i32
    if kind == c'l':
        return field.value.i64
    if kind == c'F':
        return read_table(&field.value.table)
    if kind == c'A':
        return [read_value(&field.value.array.entries[place]) for place in range(field.value.array.num_entries)]
    if kind == c'd':
        return field.value.f64
    if kind == c'x':
        return copy_bytes(field.value.bytes)
    if kind == c'T':
        return read_timestamp(field.value.u64)
    if kind == c'D':
        # Signed, as py-amqp writes it; librabbitmq declares it unsigned.
        return Decimal(<int32_t> field.value.decimal.value).scaleb(-<int> field.value.decimal.decimals)
    if kind == c'b':
        return field.value.i8
    if kind == c'B':
        return field.value.u8
    if kind == c's':
        return field.value.i16
    if kind == c'u':
        return field.value.u16
    if kind == c'i':
        return field.value.u32
    if kind == c'L':
        return field.value.u64
    if kind == c'f':
        return field.value.f32
    raise RemoteProtocolError(f"unknown AMQP field type 0x{kind:02x}")


cdef dict read_table(const amqp_table_t *table):
    """A table as a dict; of two equal keys the later one wins."""
    cdef dict out = {}
    cdef int place
    for place in range(table.num_entries):
        key = read_text(table.entries[place].key)
        if type(key) is bytes:
            key = key.decode("utf-8", "backslashreplace")
        out[key] = read_value(&table.entries[place].value)
    return out


cdef object read_field(const char *base, const Field *field):
    """A method field or property out of librabbitmq's structure at ``base``."""
    cdef const void *place = base + field.offset
    if field.kind == c's':
        return read_text((<amqp_bytes_t *> place)[0])
    if field.kind == c'S':
        return copy_bytes((<amqp_bytes_t *> place)[0])
    if field.kind == c'T':
        return read_table(<amqp_table_t *> place)
    if field.kind == c'b':
        return (<amqp_boolean_t *> place)[0] != 0
    if field.kind == c'1':
        return (<uint8_t *> place)[0]
    if field.kind == c'2':
        return (<uint16_t *> place)[0]
    if field.kind == c'4':
        return (<uint32_t *> place)[0]
    return (<uint64_t *> place)[0]


# --- Python to librabbitmq's structures -------------------------------------------------------------------------------

cdef int fill_bytes(Arena arena, amqp_bytes_t *place, object value, Py_ssize_t limit) except -1:
    """Point ``place`` at the bytes of a str or bytes object. Raises EncodeError when they are more than ``limit``."""
    cdef bytes data
    if isinstance(value, str):
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EncodeError(f"text for AMQP has no UTF-8 form: {error}") from None
    elif isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    else:
        raise EncodeError(f"AMQP string wanted, not {type(value).__name__}: {value!r:.80}")
    if len(data) > limit:
        raise EncodeError(f"AMQP string of {len(data)} bytes; the limit is {limit}: {data[:40]!r}…")
    arena.kept.append(data)
    arena.grow(4 + len(data))
    place.bytes = PyBytes_AS_STRING(data)
    place.len = PyBytes_GET_SIZE(data)
    return 0


cdef int fill_number(amqp_field_value_t *place, object value) except -1:
    """Write an int in the smallest of the types that RabbitMQ and py-amqp read alike. Raises EncodeError."""
    if -0x80000000 <= value <= 0x7FFFFFFF:
        place.kind, place.value.i32 = c'I', value
    elif -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        place.kind, place.value.i64 = c'l', value
    else:
        raise EncodeError(f"number does not fit in 64 bits: {value:.6e}")
    return 0


cdef int fill_decimal(amqp_field_value_t *place, object value) except -1:
    """Write a Decimal: a 32-bit number and up to 255 places. Raises EncodeError."""
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise EncodeError(f"{value!r} has no AMQP form")
    number = int("".join(map(str, digits)) or "0") * (-1 if sign else 1) * 10 ** min(max(exponent, 0), 20)
    if not -0x80000000 <= number <= 0x7FFFFFFF or exponent < -255:
        raise EncodeError(f"{value!r} does not fit in an AMQP decimal (32 bits, 255 places)")
    place.kind, place.value.decimal.decimals = c'D', <uint8_t> max(-exponent, 0)
    place.value.decimal.value = <uint32_t> <int32_t> number
    return 0


cdef int fill_datetime(amqp_field_value_t *place, object value) except -1:
    """Write a datetime as whole seconds; one without a zone is taken as UTC. Raises EncodeError before 1970."""
    if value.tzinfo is None:
        value = value.replace(tzinfo=timezone.utc)
    seconds = int(value.timestamp())
    if seconds < 0:
        raise EncodeError(f"dates before 1970 have no AMQP form: {value!r}")
    place.kind, place.value.u64 = c'T', seconds
    return 0


cdef int fill_value(Arena arena, amqp_field_value_t *place, object value, int depth) except -1:
    """Write a field value. Raises EncodeError when the Python type has no AMQP form."""
    arena.grow(9)
    if value is None:
        place.kind = c'V'
    elif isinstance(value, bool):
        place.kind, place.value.boolean = c't', value
    elif isinstance(value, str):
        place.kind = c'S'
        fill_bytes(arena, &place.value.bytes, value, MAX_BYTES)
    elif isinstance(value, int):
        fill_number(place, value)
    elif isinstance(value, float):
        place.kind, place.value.f64 = c'd', value
    elif isinstance(value, dict):
        place.kind = c'F'
        fill_table(arena, &place.value.table, value, depth + 1)
    elif isinstance(value, (list, tuple)):
        place.kind = c'A'
        fill_array(arena, &place.value.array, value, depth + 1)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        place.kind = c'x'
        fill_bytes(arena, &place.value.bytes, value, MAX_BYTES)
    elif isinstance(value, datetime):
        fill_datetime(place, value)
    elif isinstance(value, Decimal):
        fill_decimal(place, value)
    else:
        raise EncodeError(f"{type(value).__name__} has no AMQP form: {value!r:.80}")
    return 0


cdef int fill_array(Arena arena, amqp_array_t *array, object values, int depth) except -1:
    """Write a list. Raises EncodeError."""
    cdef int place = 0
    if depth > MAX_DEPTH:
        raise EncodeError(f"AMQP tables can be nested {MAX_DEPTH} deep, not more")
    arena.grow(4)
    array.num_entries = len(values)
    if array.num_entries:
        array.entries = <amqp_field_value_t *> arena.allocate(array.num_entries * sizeof(amqp_field_value_t))
    for place in range(array.num_entries):
        fill_value(arena, &array.entries[place], values[place], depth)
    return 0


cdef int fill_table(Arena arena, amqp_table_t *table, object values, int depth) except -1:
    """Write a dict. Raises EncodeError."""
    cdef int place = 0
    if not isinstance(values, dict):
        raise EncodeError(f"AMQP table wanted as a dict, not {type(values).__name__}")
    if depth > MAX_DEPTH:
        raise EncodeError(f"AMQP tables can be nested {MAX_DEPTH} deep, not more")
    arena.grow(4)
    items = list(values.items())
    table.num_entries = len(items)
    if table.num_entries:
        table.entries = <amqp_table_entry_t *> arena.allocate(table.num_entries * sizeof(amqp_table_entry_t))
    for place in range(table.num_entries):
        key, value = items[place]
        fill_bytes(arena, &table.entries[place].key, key if isinstance(key, str) else str(key), 255)
        fill_value(arena, &table.entries[place].value, value, depth)
    return 0


cdef int fill_field(Arena arena, char *base, const Field *field, object value) except -1:
    """Write a method field or property into librabbitmq's structure at ``base``. Raises EncodeError."""
    cdef void *place = base + field.offset
    if field.kind == c's':
        return fill_bytes(arena, <amqp_bytes_t *> place, value, 255)
    if field.kind == c'S':
        return fill_bytes(arena, <amqp_bytes_t *> place, value, MAX_BYTES)
    if field.kind == c'T':
        return fill_table(arena, <amqp_table_t *> place, value, 1)
    if field.kind == c'b':
        (<amqp_boolean_t *> place)[0] = 1 if value else 0
        return 0
    try:
        if field.kind == c'1':
            (<uint8_t *> place)[0] = value
        elif field.kind == c'2':
            (<uint16_t *> place)[0] = value
        elif field.kind == c'4':
            (<uint32_t *> place)[0] = value
        else:
            (<uint64_t *> place)[0] = value
    except (OverflowError, TypeError) as error:
        raise EncodeError(f"{field.name.decode()}={value!r:.80} does not fit: {error}") from None
    return 0


# --- the module's functions -------------------------------------------------------------------------------------------

cdef const Shape *find_shape(object method_id) except? NULL:
    """The shape of a method, NULL when there is none."""
    place = SHAPE_PLACES.get(method_id)
    if place is None:
        return NULL
    return &methods[<int> place]


cdef str reason(int status):
    return amqp_error_string2(status).decode("ascii", "replace")


def encode_method(method_id: int, /, **fields) -> bytes:
    """Return a method's arguments, as they follow its number in a frame; fields left out are empty, zero or false.
    Raises LocalProtocolError for a method or field that does not exist, EncodeError for a value that does not fit."""
    cdef const Shape *shape = find_shape(method_id)
    cdef Arena arena = Arena()
    cdef amqp_bytes_t target
    cdef char *base
    cdef int place, written
    if shape == NULL:
        raise LocalProtocolError(f"unknown AMQP method 0x{method_id:08x}")
    base = <char *> arena.allocate(shape.size)
    # Integers and bits: 8 bytes for each of at most 9 fields.
    arena.grow(80)
    for place in range(shape.count):
        name = shape.fields[place].name.decode("ascii")
        if shape.fields[place].kind == c'T':
            arena.grow(4)
        if shape.fields[place].kind != c'r' and name in fields:
            fill_field(arena, base, &shape.fields[place], fields.pop(name))
    if fields:
        raise LocalProtocolError(f"{shape.name.decode()} has no field {sorted(fields)[0]!r}")
    out = PyBytes_FromStringAndSize(NULL, arena.size)
    target.bytes, target.len = PyBytes_AS_STRING(out), arena.size
    written = amqp_encode_method(shape.id, base, target)
    if written < 0:
        raise LocalProtocolError(f"{shape.name.decode()} could not be encoded: {reason(written)}")
    return out[:written]


def decode_method(method_id: int, bytes arguments not None, /) -> tuple[str, dict[str, object]]:
    """Return a method's name and fields. Short strings come as str, long ones as bytes.
    Raises RemoteProtocolError for an unknown method and for arguments that are cut short, too long or malformed."""
    cdef const Shape *shape = find_shape(method_id)
    cdef Arena arena = Arena()
    cdef amqp_bytes_t source
    cdef void *base = NULL
    cdef int place, status
    if shape == NULL:
        raise RemoteProtocolError(f"unknown AMQP method 0x{method_id:08x}")
    check_size(arguments)
    source.bytes, source.len = PyBytes_AS_STRING(arguments), PyBytes_GET_SIZE(arguments)
    check_method(<const uint8_t *> source.bytes, source.len, shape)
    status = amqp_decode_method(shape.id, &arena.pool, source, &base)
    if status != 0:
        raise RemoteProtocolError(f"malformed {shape.name.decode()}: {reason(status)}")
    fields = {
        shape.fields[place].name.decode("ascii"): read_field(<char *> base, &shape.fields[place])
        for place in range(shape.count) if shape.fields[place].kind != c'r'
    }
    return shape.name.decode("ascii"), fields


def encode_properties(dict properties not None) -> bytes:
    """Return basic properties as they stand in a content header (flags, then values); None means absent.
    Raises LocalProtocolError for an unknown name, EncodeError for a value that does not fit."""
    cdef Arena arena = Arena()
    cdef amqp_bytes_t target
    cdef char *base = <char *> arena.allocate(properties_shape.size)
    cdef uint32_t flags = 0
    cdef int place, written
    left = {name: value for name, value in properties.items() if value is not None}
    arena.grow(2 + 8 * properties_shape.count)
    for place in range(properties_shape.count):
        name = properties_shape.fields[place].name.decode("ascii")
        if name in left:
            flags |= 0x8000 >> place
            fill_field(arena, base, &properties_shape.fields[place], left.pop(name))
    if left:
        raise LocalProtocolError(f"no basic property {sorted(left)[0]!r}")
    (<uint32_t *> base)[0] = flags
    out = PyBytes_FromStringAndSize(NULL, arena.size)
    target.bytes, target.len = PyBytes_AS_STRING(out), arena.size
    written = amqp_encode_properties(AMQP_BASIC_CLASS, base, target)
    if written < 0:
        raise LocalProtocolError(f"basic properties could not be encoded: {reason(written)}")
    return out[:written]


def decode_properties(bytes props not None) -> dict[str, object]:
    """Return the basic properties that are present, ``headers`` as a dict. Raises RemoteProtocolError."""
    cdef Arena arena = Arena()
    cdef amqp_bytes_t source
    cdef void *base = NULL
    cdef int place, status
    check_size(props)
    source.bytes, source.len = PyBytes_AS_STRING(props), PyBytes_GET_SIZE(props)
    check_properties(<const uint8_t *> source.bytes, source.len)
    status = amqp_decode_properties(AMQP_BASIC_CLASS, &arena.pool, source, &base)
    if status != 0:
        raise RemoteProtocolError(f"malformed basic properties: {reason(status)}")
    cdef uint32_t flags = (<uint32_t *> base)[0]
    return {
        properties_shape.fields[place].name.decode("ascii"): read_field(<char *> base, &properties_shape.fields[place])
        for place in range(properties_shape.count) if flags & (0x8000 >> place)
    }


def encode_table(dict table not None) -> bytes:
    """Return a field table, its size first. Raises EncodeError."""
    cdef Arena arena = Arena()
    cdef amqp_table_t native
    cdef amqp_bytes_t target
    cdef size_t offset = 0
    cdef int status
    memset(&native, 0, sizeof(native))
    fill_table(arena, &native, table, 1)
    out = PyBytes_FromStringAndSize(NULL, arena.size)
    target.bytes, target.len = PyBytes_AS_STRING(out), arena.size
    status = amqp_encode_table(target, &native, &offset)
    if status != 0:
        raise LocalProtocolError(f"table could not be encoded: {reason(status)}")
    return out[:offset]


def decode_table(bytes data not None) -> dict[str, object]:
    """Return a field table (its size first, nothing behind it). Raises RemoteProtocolError."""
    cdef Arena arena = Arena()
    cdef amqp_table_t native
    cdef amqp_bytes_t source
    cdef size_t offset = 0
    cdef int status
    check_size(data)
    source.bytes, source.len = PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)
    check_end(check_table(<const uint8_t *> source.bytes, 0, source.len, 1), source.len)
    memset(&native, 0, sizeof(native))
    status = amqp_decode_table(source, &arena.pool, &native, &offset)
    if status != 0:
        raise RemoteProtocolError(f"malformed table: {reason(status)}")
    return read_table(&native)
