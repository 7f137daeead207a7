# cython: language_level=3, cdivision=True
"""What the worker decides on, scanned out of a task message's encoded properties. Nothing is decoded or allocated; no content
can raise. Layout of the headers: Celery's protocol 2. Full decoding is in ``wire.properties``.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.string cimport memcmp, memset

from fastq.wire.buffer cimport load_double, load_float, load_u16, load_u32, load_u64
from fastq.wire.dates cimport LAST_SECOND, count_digits, parse_iso8601, read_clock, read_fraction
from fastq.wire.properties cimport HAS_CONTENT_ENCODING, HAS_CONTENT_TYPE, HAS_HEADERS

cdef enum:
    MAX_NAME = 1024     # chosen: longer task names and ids are not task messages
    MAX_DEPTH = 32      # specified: reliability rules, section 6.1
    MAX_NUMBER = 24     # chosen: longer texts are not read as a number

#: What a message was refused for, by the numbers ``scan_head`` returns; also the names under which they are counted.
PROBLEMS = ("fine", "properties", "no-task", "task", "no-id", "id", "eta", "expires", "timelimit", "retries", "x-death")


@cython.boundscheck(False)
cdef Py_ssize_t value_size(uint8_t kind, const uint8_t *p, Py_ssize_t left) noexcept nogil:
    """Bytes that a field value of this type takes, -1 when it does not fit in ``left`` or the type is unknown."""
    cdef Py_ssize_t size
    if kind == c'S' or kind == c'x' or kind == c'A' or kind == c'F':
        if left < 4:
            return -1
        size = 4 + <Py_ssize_t> load_u32(p)
    elif kind == c'V':
        size = 0
    elif kind == c't' or kind == c'b' or kind == c'B':
        size = 1
    elif kind == c's' or kind == c'u' or kind == c'U':
        size = 2
    elif kind == c'I' or kind == c'i' or kind == c'f':
        size = 4
    elif kind == c'l' or kind == c'L' or kind == c'd' or kind == c'T':
        size = 8
    elif kind == c'D':
        size = 5
    else:
        return -1
    return size if size <= left else -1


cdef int read_number(uint8_t kind, const uint8_t *p, double *value) noexcept nogil:
    """Put a numeric field value into ``value``; -1 when the type is not a number. The caller has checked the size."""
    if kind == c'I':
        value[0] = <double> <int> load_u32(p)
    elif kind == c'i':
        value[0] = <double> load_u32(p)
    elif kind == c'l':
        value[0] = <double> <int64_t> load_u64(p)
    elif kind == c'L':
        value[0] = <double> load_u64(p)
    elif kind == c's' or kind == c'U':
        value[0] = <double> <short> load_u16(p)
    elif kind == c'u':
        value[0] = <double> load_u16(p)
    elif kind == c'b':
        value[0] = <double> <signed char> p[0]
    elif kind == c'B':
        value[0] = <double> p[0]
    elif kind == c'd':
        value[0] = load_double(p)
    elif kind == c'f':
        value[0] = <double> load_float(p)
    else:
        return -1
    return 0


cdef int read_quantity(uint8_t kind, const uint8_t *p, Py_ssize_t size, double *value) noexcept nogil:
    """The same, and of a text that is a decimal number: clients in languages that are loose about types send those."""
    cdef Py_ssize_t whole
    if kind != c'S':
        return read_number(kind, p, value)
    p += 4
    size -= 4
    whole = count_digits(p, size)
    if whole == 0 or size > MAX_NUMBER:
        return -1
    value[0] = 0
    for i in range(whole):
        value[0] = value[0] * 10 + (p[i] - c'0')
    if whole < size and p[whole] == c'.':
        value[0] += read_fraction(p, size, &whole)
    return 0 if whole == size else -1


cdef int read_moment(uint8_t kind, const uint8_t *p, Py_ssize_t size, double *unix) noexcept nogil:
    """Read a text in ISO 8601, or AMQP's own timestamp; -1 when it is none. Midnight of 1970-01-01 is off by 1 µs."""
    if kind == c'S':
        unix[0] = parse_iso8601(p + 4, size - 4)
    elif kind == c'T' and 0 <= <int64_t> load_u64(p) <= LAST_SECOND:
        unix[0] = <double> load_u64(p)
    else:
        return -1
    if unix[0] == 0:
        unix[0] = 1e-6  # 0 stands for none
    return 0 if unix[0] == unix[0] else -1


cdef bint is_false(uint8_t kind, const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """Whether Celery takes a value for one that is absent: no items, no text, zero, false."""
    cdef double number
    if kind == c'A' or kind == c'F' or kind == c'S':
        return size == 4
    if kind == c't':
        return p[0] == 0
    return kind == c'V' or (read_number(kind, p, &number) == 0 and number == 0)


cdef int read_limits(const uint8_t *p, Py_ssize_t size, Head *head) noexcept nogil:
    """Read ``timelimit``: an array of hard and soft seconds, each a number, as text too, or void."""
    cdef double limits[2]
    cdef Py_ssize_t at = 0, taken
    cdef int count = 0
    cdef uint8_t kind
    limits[0] = limits[1] = -1
    while at < size:
        kind = p[at]
        at += 1
        taken = value_size(kind, p + at, size - at)
        if taken < 0 or count == 2:
            return -1
        if kind != c'V':
            if read_quantity(kind, p + at, taken, &limits[count]) < 0 or not 0 <= limits[count] < 1e9:
                return -1
        at += taken
        count += 1
    if count != 2:
        return -1
    head.time_limit, head.soft_time_limit = limits[0], limits[1]
    return 0


cdef bint are_deaths(uint8_t kind, const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """Whether RabbitMQ can add to an ``x-death``: tables, the ``count`` of each a whole number; no array is replaced.

    Its queue ends, and in the end its virtual host, of writing the next death behind anything else. Measured with 3.10.
    """
    cdef Py_ssize_t at = 4, end, taken
    cdef uint8_t key_size, inner
    cdef const uint8_t *key
    cdef double count
    if kind != c'A':
        return True
    while at < size:
        taken = value_size(c'F', p + at + 1, size - at - 1)
        if p[at] != c'F' or taken < 0:
            return False
        end = at + 1 + taken
        at += 5
        while at < end:
            key_size = p[at]
            key = p + at + 1
            at += 2 + key_size
            if at > end:
                return False
            inner = p[at - 1]
            taken = value_size(inner, p + at, end - at)
            if taken < 0:
                return False
            if is_key(key, key_size, b"count", 5) and inner != c'V' and (
                    inner == c'd' or inner == c'f' or read_number(inner, p + at, &count) < 0):
                return False
            at += taken
    return True


cdef bint breaks_dead_letters(const uint8_t *props, Py_ssize_t size) noexcept nogil:
    """Whether properties hold an ``x-death`` that RabbitMQ cannot add to, wherever else they are wrong as well."""
    cdef Py_ssize_t at = 2, end, taken
    cdef uint8_t key_size, kind
    cdef const uint8_t *key
    if size < 2 or not load_u16(props) & HAS_HEADERS:
        return False
    if load_u16(props) & HAS_CONTENT_TYPE and at < size:
        at += 1 + props[at]
    if load_u16(props) & HAS_CONTENT_ENCODING and at < size:
        at += 1 + props[at]
    taken = value_size(c'F', props + at, size - at)
    if taken < 0:
        return False
    end = at + taken
    at += 4
    while at < end:
        key_size = props[at]
        key = props + at + 1
        at += 2 + key_size
        if at > end:
            return False
        kind = props[at - 1]
        taken = value_size(kind, props + at, end - at)
        if taken < 0:
            return False
        if is_key(key, key_size, b"x-death", 7) and not are_deaths(kind, props + at, taken):
            return True
        at += taken
    return False


cdef bint is_nested_well(uint8_t kind, const uint8_t *p, Py_ssize_t size, int depth) noexcept nogil:
    """Whether a table or array is whole and nested no deeper than MAX_DEPTH; ``p`` is behind its length."""
    cdef Py_ssize_t at = 0, taken
    cdef uint8_t inner
    if depth > MAX_DEPTH:
        return False
    while at < size:
        if kind == c'F':
            at += 1 + p[at]
            if at >= size:
                return False
        inner = p[at]
        at += 1
        taken = value_size(inner, p + at, size - at)
        if taken < 0:
            return False
        if (inner == c'F' or inner == c'A') and not is_nested_well(inner, p + at + 4, taken - 4, depth + 1):
            return False
        at += taken
    return True


cdef bint is_utf8(const uint8_t *p, Py_ssize_t size) noexcept:
    """Whether text decodes; nearly all of it is ASCII."""
    cdef Py_ssize_t i
    for i in range(size):
        if p[i] >= 0x80:
            try:
                PyUnicode_DecodeUTF8(<const char *> p, size, NULL)
            except UnicodeDecodeError:
                return False
            return True
    return True


cdef inline bint is_key(const uint8_t *key, Py_ssize_t size, const char *name, Py_ssize_t length) noexcept nogil:
    return size == length and memcmp(key, name, length) == 0


cdef int scan_field(const uint8_t *base, const uint8_t *key, Py_ssize_t key_size, uint8_t kind, const uint8_t *value,
                    Py_ssize_t size, Head *head) noexcept nogil:
    """Take one header field into ``head`` if it is one that the worker decides on."""
    cdef double number
    cdef Span text
    text.offset = <uint32_t> (value + 4 - base)
    text.length = <uint32_t> (size - 4) if kind == c'S' else 0
    if is_key(key, key_size, b"task", 4):
        if kind != c'S' or text.length > MAX_NAME:
            return BAD_TASK
        head.task = text
    elif is_key(key, key_size, b"id", 2):
        if kind != c'S' or not 0 < text.length <= MAX_NAME:
            return BAD_ID
        head.id = text
    elif is_key(key, key_size, b"eta", 3):
        if kind == c'V':
            return FINE
        if read_moment(kind, value, size, &head.eta) < 0:
            head.eta = 0
            return BAD_ETA
    elif is_key(key, key_size, b"expires", 7):
        if kind == c'V':
            return FINE
        if read_moment(kind, value, size, &head.expires) == 0:
            return FINE
        head.expires = 0
        if read_number(kind, value, &number) < 0 or not 0 <= number < 1e12:
            return BAD_EXPIRES
        # Other clients send seconds from now; what is larger than any such span is a unix time.
        head.expires = number if number > 1e9 else read_clock() + number
    elif is_key(key, key_size, b"timelimit", 9):
        if is_false(kind, value, size):
            return FINE
        if kind != c'A' or read_limits(value + 4, size - 4, head) < 0:
            return BAD_TIMELIMIT
    elif is_key(key, key_size, b"retries", 7):
        if kind == c'V':
            return FINE
        if read_quantity(kind, value, size, &number) < 0 or not 0 <= number < 1e9:
            return BAD_RETRIES
        head.retries = <int64_t> number
    elif is_key(key, key_size, b"ignore_result", 13):
        if kind == c't':
            head.ignore_result = value[0] != 0
    elif is_key(key, key_size, b"compression", 11):
        head.compressed = kind == c'S' and text.length > 0
    elif is_key(key, key_size, b"x-delivery-count", 16):
        if read_number(kind, value, &number) == 0 and 0 <= number < 1e9:
            head.delivery_count = <int64_t> number
    elif is_key(key, key_size, b"x-death", 7) and not are_deaths(kind, value, size):
        return BAD_DEATHS
    return FINE


cdef int scan_table(const uint8_t *base, const uint8_t *p, Py_ssize_t size, Head *head) noexcept nogil:
    """Walk the top level of the headers table; nested tables are only checked, not read."""
    cdef Py_ssize_t at = 0, key_size, taken
    cdef const uint8_t *key
    cdef uint8_t kind
    cdef int problem, first = FINE
    while at < size:
        key_size = p[at]
        key = p + at + 1
        at += 1 + key_size
        if at >= size:
            return BAD_PROPERTIES
        kind = p[at]
        at += 1
        taken = value_size(kind, p + at, size - at)
        if taken < 0:
            return BAD_PROPERTIES
        if (kind == c'F' or kind == c'A') and not is_nested_well(kind, p + at + 4, taken - 4, 2):
            return BAD_PROPERTIES
        problem = scan_field(base, key, key_size, kind, p + at, taken, head)
        # Go on after a bad field: the id may still come, and the failure can then be stored under it.
        if problem != FINE and first == FINE:
            first = problem
        at += taken
    return first


cdef int scan_head(const uint8_t *props, Py_ssize_t size, Head *head) noexcept nogil:
    """Fill ``head`` from encoded basic properties and return FINE or the first Problem. Reads nothing outside them."""
    cdef uint16_t flags
    cdef Py_ssize_t at = 2, length
    cdef int problem = FINE, bit
    memset(head, 0, sizeof(Head))
    head.ignore_result = -1
    head.time_limit = head.soft_time_limit = -1
    if size < 2:
        return BAD_PROPERTIES
    flags = load_u16(props)
    if flags & 3:
        return BAD_PROPERTIES
    for bit in range(15, 1, -1):
        if not flags & (1 << bit):
            continue
        if bit == 13:
            if size - at < 4:
                return BAD_PROPERTIES
            length = 4 + <Py_ssize_t> load_u32(props + at)
        elif bit == 12 or bit == 11:
            length = 1
        elif bit == 6:
            length = 8
        else:
            if size - at < 1:
                return BAD_PROPERTIES
            length = 1 + <Py_ssize_t> props[at]
        if length > size - at:
            return BAD_PROPERTIES
        if bit == 13:
            problem = scan_table(props, props + at + 4, length - 4, head)
            if problem == BAD_PROPERTIES:
                return problem
        elif bit == 11:
            head.priority = props[at]
        elif bit == 10:
            head.correlation_id.offset, head.correlation_id.length = <uint32_t> (at + 1), <uint32_t> (length - 1)
        elif bit == 9:
            head.reply_to.offset, head.reply_to.length = <uint32_t> (at + 1), <uint32_t> (length - 1)
        at += length
    if problem != FINE:
        return problem
    if head.task.length == 0:
        return NO_TASK
    if head.id.length == 0:
        return NO_ID
    return FINE


cdef str read_text(const char *text, Py_ssize_t size):
    """Text of a property, with lone surrogates as py-amqp writes them; whatever else is wrong with it is replaced."""
    try:
        return PyUnicode_DecodeUTF8(text, size, b"surrogatepass")
    except UnicodeDecodeError:
        return PyUnicode_DecodeUTF8(text, size, b"replace")


cdef str span_text(bytes props, Span span):
    return read_text(PyBytes_AS_STRING(props) + span.offset, span.length)


def scan(props: bytes) -> dict[str, object]:
    """Return what the worker reads of encoded properties, and under ``problem`` what it would refuse them for."""
    cdef Head head
    cdef int problem = scan_head(<const uint8_t *> PyBytes_AS_STRING(props), PyBytes_GET_SIZE(props), &head)
    return {
        "problem": PROBLEMS[problem],
        "task": span_text(props, head.task), "id": span_text(props, head.id),
        "reply_to": span_text(props, head.reply_to), "correlation_id": span_text(props, head.correlation_id),
        "eta": head.eta, "expires": head.expires, "time_limit": head.time_limit, "soft_time_limit": head.soft_time_limit,
        "retries": head.retries, "delivery_count": head.delivery_count, "priority": head.priority,
        "ignore_result": None if head.ignore_result < 0 else bool(head.ignore_result),
        "breaks_dead_letters": bool(breaks_dead_letters(<const uint8_t *> PyBytes_AS_STRING(props), PyBytes_GET_SIZE(props))),
    }
