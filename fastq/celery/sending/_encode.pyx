# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What Celery's publish path spends its time on, compiled: headers as text and as bytes, live settings. No I/O.

Each function writes exactly what Celery, kombu and py-amqp write, or says that it cannot: then theirs are to be asked.
Sources: celery.utils.saferepr, py-amqp's serialization (types of field values), celery.utils.collections.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastq.wire.buffer cimport Writer, store_u16, store_u32
from fastq.wire.message cimport put_shortstr
from fastq.wire.properties cimport (
    HAS_CONTENT_ENCODING, HAS_CONTENT_TYPE, HAS_CORRELATION_ID, HAS_DELIVERY_MODE, HAS_EXPIRATION, HAS_HEADERS,
    HAS_PRIORITY, HAS_REPLY_TO)

from json.encoder import c_make_encoder, encode_basestring_ascii

from fastq.errors import EncodeError

cdef extern from "Python.h":
    PyObject *PyDict_GetItemWithError(object mapping, object key) except? NULL
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

cdef enum:
    MAX_DEPTH = 32  # as in wire.message: no header goes deeper
    MAX_LEVELS = 8  # of short_repr; Celery's task_repr_maxlevels is 3


# --- properties -------------------------------------------------------------------------------------------------------

cdef int put_long(Writer out, const char *data, Py_ssize_t size) except -1:
    out.put_u8(c'S')
    out.put_u32(<uint32_t> size)
    return out.put(data, size)


cdef int put_integer(Writer out, object value) except -1:
    cdef int overflow = 0
    cdef int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow:
        raise EncodeError(f"message header integer beyond 64 bits: {value}")
    # py-amqp takes the smallest 32-bit integer for a 64-bit one, and calls those L.
    if number > 2147483647 or number < -2147483647:
        out.put_u8(c'L')
        return out.put_u64(<uint64_t> number)
    out.put_u8(c'I')
    return out.put_u32(<uint32_t> <int> number)


cdef int put_value(Writer out, object value, int depth) except -1:
    cdef Py_ssize_t size
    cdef const char *data
    cdef Py_ssize_t start
    if isinstance(value, str):
        data = PyUnicode_AsUTF8AndSize(value, &size)
        return put_long(out, data, size)
    if value is None:
        return out.put_u8(c'V')
    if isinstance(value, bytes):
        return put_long(out, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    if isinstance(value, bool):
        out.put_u8(c't')
        return out.put_u8(1 if value else 0)
    if isinstance(value, float):
        out.put_u8(c'd')
        return out.put_double(value)
    if isinstance(value, int):
        return put_integer(out, value)
    if depth == MAX_DEPTH:
        raise EncodeError("message headers are nested deeper than 32 levels")
    if isinstance(value, dict):
        out.put_u8(c'F')
        return put_table(out, value, depth + 1)
    if isinstance(value, (list, tuple)):
        out.put_u8(c'A')
        start = out.size
        out.put_u32(0)
        for item in value:
            put_value(out, item, depth + 1)
        store_u32(out.data + start, <uint32_t> (out.size - start - 4))
        return 0
    raise EncodeError(f"message header of type {type(value).__name__}: {value!r:.80}")


cdef int put_table(Writer out, dict table, int depth) except -1:
    cdef Py_ssize_t start = out.size
    out.put_u32(0)
    for key, value in table.items():
        if type(key) is not str:
            raise EncodeError(f"message header with a key of type {type(key).__name__}: {key!r:.80}")
        put_shortstr(out, key)
        put_value(out, value, depth)
    store_u32(out.data + start, <uint32_t> (out.size - start - 4))
    return 0


cdef int put_octet(Writer out, object value) except -1:
    if not isinstance(value, int) or not 0 <= value <= 255:
        raise EncodeError(f"message property that is not between 0 and 255: {value!r:.80}")
    return out.put_u8(<uint8_t> value)


def task_properties(
    str content_type,
    str content_encoding,
    dict headers,
    object delivery_mode,
    object priority,
    str correlation_id,
    str reply_to,
    str expiration,
) -> bytes:
    """Return basic properties as py-amqp encodes them; None is absent. Raises EncodeError for what it cannot."""
    cdef Writer out = Writer()
    cdef uint16_t flags = HAS_CONTENT_TYPE | HAS_CONTENT_ENCODING | HAS_HEADERS | HAS_CORRELATION_ID | HAS_REPLY_TO
    try:
        out.put_u16(0)
        put_shortstr(out, content_type)
        put_shortstr(out, content_encoding)
        put_table(out, headers, 1)
        if delivery_mode is not None:
            flags |= HAS_DELIVERY_MODE
            put_octet(out, delivery_mode)
        if priority is not None:
            flags |= HAS_PRIORITY
            put_octet(out, priority)
        put_shortstr(out, correlation_id)
        put_shortstr(out, reply_to)
        if expiration is not None:
            flags |= HAS_EXPIRATION
            put_shortstr(out, expiration)
    except UnicodeEncodeError as error:
        raise EncodeError(f"a message property or header is not text in UTF-8: {error}") from None
    store_u16(out.data, flags)
    return out.take()


cdef Writer scratch = Writer()

cdef enum Variable:
    TASK_ID
    ARGSREPR
    KWARGSREPR
    ORIGIN

cdef dict VARIABLES = {"id": TASK_ID, "root_id": TASK_ID, "argsrepr": ARGSREPR, "kwargsrepr": KWARGSREPR, "origin": ORIGIN}


cdef class PropertiesTemplate:
    """The properties of one task's calls as ``task_properties`` encodes them, written but for what differs from call to call.

    Those are the headers ``id``, ``root_id``, ``argsrepr``, ``kwargsrepr`` and ``origin``, and what answers are known by.
    Raises EncodeError for what ``task_properties`` cannot write.
    """

    cdef bytes head             # all before the headers
    cdef list pieces            # the headers around the variable ones: one more than those
    cdef list variables
    cdef bytes octets           # delivery mode and priority
    cdef str expiration

    def __init__(self, str content_type, str content_encoding, dict headers, object delivery_mode, object priority,
                 str expiration):
        cdef Writer out = Writer()
        cdef bytes plain = task_properties(content_type, content_encoding, {}, delivery_mode, priority, "", "", None)
        cdef Py_ssize_t before = 2 + 1 + len(content_type.encode()) + 1 + len(content_encoding.encode())
        cdef uint16_t flags = (plain[0] << 8 | plain[1]) | (HAS_EXPIRATION if expiration is not None else 0)
        self.head = flags.to_bytes(2, "big") + plain[2:before]
        self.octets = plain[before + 4:-2]
        self.expiration = expiration
        self.pieces, self.variables = [], []
        for key, value in headers.items():
            put_shortstr(out, key)
            if key in VARIABLES:
                self.variables.append(VARIABLES[key])
                self.pieces.append(out.take())
            else:
                put_value(out, value, 1)
        self.pieces.append(out.take())

    def fill(self, str task_id not None, str argsrepr not None, str kwargsrepr not None, str origin not None,
             str reply_to not None) -> bytes:
        """Return the properties of one call. Raises EncodeError."""
        cdef Writer out = scratch   # nobody's code runs before its bytes are taken
        cdef Py_ssize_t i, table
        try:
            out.size = 0
            out.put_bytes(self.head)
            table = out.size
            out.put_u32(0)
            for i in range(len(self.variables)):
                out.put_bytes(<bytes> self.pieces[i])
                put_variable(out, self.variables[i], task_id, argsrepr, kwargsrepr, origin)
            out.put_bytes(<bytes> self.pieces[len(self.variables)])
            store_u32(out.data + table, <uint32_t> (out.size - table - 4))
            out.put_bytes(self.octets)
            put_shortstr(out, task_id)
            put_shortstr(out, reply_to)
            if self.expiration is not None:
                put_shortstr(out, self.expiration)
        except UnicodeEncodeError as error:
            raise EncodeError(f"a message property or header is not text in UTF-8: {error}") from None
        return out.take()


cdef int put_variable(Writer out, int variable, str task_id, str argsrepr, str kwargsrepr, str origin) except -1:
    if variable == TASK_ID:
        return put_value(out, task_id, 1)
    if variable == ARGSREPR:
        return put_value(out, argsrepr, 1)
    return put_value(out, kwargsrepr if variable == KWARGSREPR else origin, 1)


# --- text of arguments ------------------------------------------------------------------------------------------------

cdef class Excerpt:
    """Text under construction, with the containers that it is inside of."""

    cdef list parts
    cdef Py_ssize_t left
    cdef int levels
    cdef PyObject *inside[MAX_LEVELS]

    cdef bint put(self, str text) except -1:
        self.parts.append(text)
        self.left -= len(text)
        return self.left > 0


cdef bint show(Excerpt out, object value, int depth) except -1:
    """Append a value's text; False when Celery would cut it, or has other words for it."""
    cdef type kind = type(value)
    if kind is str:
        return out.put("'" + (<str> value).replace("'", "\\'") + "'")
    if kind is int or kind is float or kind is bool or value is None:
        return out.put(str(value))
    if kind is tuple:
        return show_items(out, value, depth, "(", ",)" if PyTuple_GET_SIZE(value) == 1 else ")")
    if kind is list:
        return show_items(out, value, depth, "[", "]")
    if kind is dict:
        return show_items(out, value, depth, "{", "}")
    return False


cdef bint show_items(Excerpt out, object value, int depth, str start, str end) except -1:
    cdef Py_ssize_t i
    if out.levels and depth >= out.levels:
        return out.put(start + "..." + end)
    if depth == MAX_LEVELS:
        return False
    for i in range(depth):
        if out.inside[i] == <PyObject *> value:
            return False
    out.inside[depth] = <PyObject *> value
    if not out.put(start):
        return False
    if type(value) is dict:
        if not show_pairs(out, value, depth + 1):
            return False
    elif type(value) is list:
        for i in range(PyList_GET_SIZE(value)):
            if i and not out.put(", ") or not show(out, <object> PyList_GET_ITEM(value, i), depth + 1):
                return False
    else:
        for i in range(PyTuple_GET_SIZE(value)):
            if i and not out.put(", ") or not show(out, <object> PyTuple_GET_ITEM(value, i), depth + 1):
                return False
    return out.put(end)


cdef bint show_pairs(Excerpt out, dict value, int depth) except -1:
    cdef PyObject *key
    cdef PyObject *item
    cdef Py_ssize_t at = 0
    cdef bint first = True
    while PyDict_Next(value, &at, &key, &item):
        if not first and not out.put(", "):
            return False
        first = False
        if type(<object> key) is not str and type(<object> key) is not int:
            return False
        if not show(out, <object> key, 0) or not out.put(": ") or not show(out, <object> item, depth):
            return False
    return True


def short_repr(value, Py_ssize_t max_size, int max_levels) -> str | None:
    """Return the text that Celery's saferepr makes of plain and short arguments, None when that one is to be asked."""
    cdef Excerpt out = Excerpt.__new__(Excerpt)
    if type(value) is tuple and not value:
        return "()" if max_size > 2 else None
    if type(value) is dict and not value:
        return "{}" if max_size > 2 else None
    out.parts = []
    out.left = max_size
    out.levels = max_levels
    return "".join(out.parts) if show(out, value, 0) else None


# --- body -------------------------------------------------------------------------------------------------------------

cdef bint put_json(Writer out, object value, int depth) except -1:
    """Write plain values as the json module does; False for all others, which it has its own words for."""
    cdef type kind = type(value)
    cdef Py_ssize_t i
    if kind is str:
        return put_json_text(out, value)
    if value is None:
        return put_ascii(out, "null")
    if kind is bool:
        return put_ascii(out, "true" if value else "false")
    if kind is int:
        return put_ascii(out, str(value))
    if kind is float:
        return value - value == 0 and put_ascii(out, repr(value))
    if depth == MAX_DEPTH:
        return False
    if kind is dict:
        return put_json_object(out, value, depth)
    if kind is not list and kind is not tuple:
        return False
    out.put_u8(c'[')
    for i in range(len(value)):
        if i:
            out.put(b", ", 2)
        if not put_json(out, value[i], depth + 1):
            return False
    out.put_u8(c']')
    return True


cdef bint put_json_object(Writer out, dict value, int depth) except -1:
    cdef bint first = True
    out.put_u8(c'{')
    for key, item in value.items():
        if not first:
            out.put(b", ", 2)
        first = False
        if type(key) is not str or not put_json_text(out, key):
            return False
        out.put(b": ", 2)
        if not put_json(out, item, depth + 1):
            return False
    out.put_u8(c'}')
    return True


cdef bint put_json_text(Writer out, str text) except -1:
    cdef Py_ssize_t i, size = len(text)
    cdef const uint8_t *p
    if not text.isascii():
        return put_ascii(out, encode_basestring_ascii(text))
    p = <const uint8_t *> PyUnicode_AsUTF8AndSize(text, NULL)
    for i in range(size):
        if p[i] < 0x20 or p[i] > 0x7E or p[i] == c'"' or p[i] == c'\\':
            return put_ascii(out, encode_basestring_ascii(text))
    out.put_u8(c'"')
    out.put(p, size)
    out.put_u8(c'"')
    return True


cdef bint put_ascii(Writer out, str text) except -1:
    out.put(PyUnicode_AsUTF8AndSize(text, NULL), len(text))
    return True


def dump_json(value, default) -> bytes:
    """Return JSON as json.dumps writes it with kombu's encoder; ``default`` is its method for other types."""
    cdef Writer out = Writer()
    if put_json(out, value, 0):
        return out.take()
    # The C encoder remembers the containers that it is in: one of its own for each call, as threads may meet in it.
    encode = c_make_encoder({}, default, encode_basestring_ascii, None, ": ", ", ", False, False, True)
    return "".join(encode(value, 0)).encode("ascii")


# --- settings ---------------------------------------------------------------------------------------------------------

def read_setting(list maps, tuple keys, default):
    """Return what Celery's configuration view finds for a setting's names (``keys``) in its ``maps``, as they are now."""
    cdef PyObject *found
    for mapping in maps:
        for key in keys:
            if type(mapping) is dict:
                found = PyDict_GetItemWithError(mapping, key)
                if found != NULL:
                    return <object> found
                continue
            try:
                return mapping[key]
            except KeyError:
                pass
    return default
