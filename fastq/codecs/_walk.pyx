# cython: language_level=3, boundscheck=False, wraparound=False
"""Walks over values and over JSON text that decide which way is safe; they convert nothing themselves.

``is_plain`` says whether orjson writes a value exactly, ``survey`` whether it reads a text exactly, ``short_repr``
shows a value within bounds. Only exact built-in types are entered, so that no code of the user runs inside the first two.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.math cimport isfinite
from libc.string cimport memchr, memcmp

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1
    double PyFloat_AS_DOUBLE(object value)

cdef enum:
    MAX_ENCODE_DEPTH = 250  # measured: orjson 3.13 refuses to write more than 254 levels
    MAX_DECODE_DEPTH = 512  # chosen: orjson reads 1,024 levels, the json module as many as the stack allows
    LONG_DIGITS = 19        # the shortest integer beyond 64 bits has 19 digits
    MAX_DIGITS = 4300       # CPython's own limit, sys.int_info.default_max_str_digits
    SAMPLE_ITEMS = 8        # short_repr: so many short scalars cannot be long, whatever they are
    SAMPLE_TEXT = 64
    REPR_DEPTH = 3          # as Celery's task_repr_maxlevels

#: What ``survey`` found.
TAGGED = 1
LONG_INTEGER = 2
HUGE_INTEGER = 4
TOO_DEEP = 8


cdef bint plain(object value, int depth) except -1:
    cdef type kind = type(value)
    cdef PyObject *key
    cdef PyObject *item
    cdef Py_ssize_t i = 0
    cdef int overflow = 0
    if kind is str or value is None or kind is bool:
        return True
    if kind is int:
        PyLong_AsLongLongAndOverflow(value, &overflow)
        return overflow == 0
    if kind is float:
        # orjson writes NaN and the infinities as null.
        return isfinite(PyFloat_AS_DOUBLE(value))
    if depth == MAX_ENCODE_DEPTH:
        return False
    if kind is list:
        for i in range(PyList_GET_SIZE(value)):
            if not plain(<object> PyList_GET_ITEM(value, i), depth + 1):
                return False
        return True
    if kind is tuple:
        for i in range(PyTuple_GET_SIZE(value)):
            if not plain(<object> PyTuple_GET_ITEM(value, i), depth + 1):
                return False
        return True
    if kind is dict:
        while PyDict_Next(value, &i, &key, &item):
            if type(<object> key) is not str or not plain(<object> item, depth + 1):
                return False
        return True
    return False


def is_plain(value) -> bool:
    """Return whether orjson writes the value as json does: exact built-in types, 64-bit integers, finite floats."""
    return plain(value, 0)


cdef const char *string_end(const char *p, const char *end) noexcept nogil:
    """The closing quote of a string that starts at ``p``, NULL when there is none."""
    cdef const char *quote = p
    cdef const char *slash
    while True:
        quote = <const char *> memchr(quote, c'"', end - quote)
        if quote == NULL:
            return NULL
        slash = quote
        while slash > p and (slash - 1)[0] == c'\\':
            slash -= 1
        if (quote - slash) % 2 == 0:
            return quote
        quote += 1


cdef inline bint is_digit(char c) noexcept nogil:
    return c'0' <= c <= c'9'


cdef int scan(const char *p, const char *end, int max_depth) noexcept nogil:
    cdef int found = 0, depth = 0
    cdef const char *start
    while p < end:
        if p[0] == c'"':
            start = p + 1
            p = string_end(start, end)
            if p == NULL:
                return found  # not JSON: the parser finds the words for it
            if p - start == 8 and memcmp(start, b"__type__", 8) == 0:
                found |= 1
        elif p[0] == c'[' or p[0] == c'{':
            depth += 1
            if depth > max_depth:
                return found | 8
        elif p[0] == c']' or p[0] == c'}':
            depth -= 1
        elif is_digit(p[0]):
            start = p
            while p < end and is_digit(p[0]):
                p += 1
            if p < end and (p[0] == c'.' or p[0] == c'e' or p[0] == c'E'):
                while p < end and (is_digit(p[0]) or p[0] in b".eE+-"):
                    p += 1
            elif p - start > MAX_DIGITS:
                return found | 4
            elif p - start >= LONG_DIGITS:
                found |= 2
            continue
        p += 1
    return found


def survey(bytes data, int max_depth=MAX_DECODE_DEPTH) -> int:
    """Return what in a JSON text orjson would not read exactly, as flags; 0 means that it reads all of it exactly.

    One deeper than ``max_depth`` is TOO_DEEP. The text need not be JSON. One pass, about a nanosecond a byte outside strings.
    """
    cdef const char *p = PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    return scan(p, p + size, max_depth)


cdef inline const char *skip_space(const char *p, const char *end) noexcept nogil:
    while p < end and (p[0] == c' ' or p[0] == c'\t' or p[0] == c'\n' or p[0] == c'\r'):
        p += 1
    return p


cdef const char *value_end(const char *p, const char *end) noexcept nogil:
    """Where a value in an object or array ends that starts at ``p``; NULL when it does not."""
    cdef Py_ssize_t depth = 0
    while p < end:
        if p[0] == c'"':
            p = string_end(p + 1, end)
            if p == NULL:
                return NULL
        elif p[0] == c'[' or p[0] == c'{':
            depth += 1
        elif p[0] == c']' or p[0] == c'}':
            if depth == 0:
                return p
            depth -= 1
        elif p[0] == c',' and depth == 0:
            return p
        p += 1
    return NULL


def members(bytes data) -> dict[bytes, bytes] | None:
    """Return the members of a JSON object, names and values as they are written, without reading the values; None when
    the text is no object."""
    cdef const char *begin = PyBytes_AS_STRING(data)
    cdef const char *end = begin + PyBytes_GET_SIZE(data)
    cdef const char *p = skip_space(begin, end)
    cdef const char *name
    cdef const char *last
    cdef dict found = {}
    if p == end or p[0] != c'{':
        return None
    p = skip_space(p + 1, end)
    if p < end and p[0] == c'}':
        return found if skip_space(p + 1, end) == end else None
    while p < end and p[0] == c'"':
        name = p + 1
        last = string_end(name, end)
        if last == NULL:
            return None
        p = skip_space(last + 1, end)
        if p == end or p[0] != c':':
            return None
        p = skip_space(p + 1, end)
        key = name[:last - name]
        last = value_end(p, end)
        if last == NULL or last[0] == c']':
            return None
        found[key] = p[:last - p].rstrip()
        p = skip_space(last + 1, end)
        if last[0] == c'}':
            return found if p == end else None
    return None


cdef class Excerpt:
    """Text under construction, at most ``left`` more characters of it; -1: it has been cut off."""
    cdef list parts
    cdef Py_ssize_t left

    cdef int put(self, str text) except -1:
        if self.left < 0:
            return 0
        if len(text) > self.left:
            text = text[:self.left] + "..."
            self.left = -1
        else:
            self.left -= len(text)
        self.parts.append(text)
        return 0

    cdef int put_items(self, str opening, object items, str closing, int depth) except -1:
        cdef bint first = True
        self.put(opening)
        if depth >= REPR_DEPTH:
            self.put("...")
            items = ()
        for item in items:
            if self.left < 0:
                return 0
            if not first:
                self.put(", ")
            first = False
            self.put_value(item, depth + 1)
        self.put(",)" if closing == ")" and len(items) == 1 else closing)
        return 0

    cdef int put_dict(self, dict value, int depth) except -1:
        cdef bint first = True
        self.put("{")
        if depth >= REPR_DEPTH:
            self.put("...")
            value = {}
        # A copy: the repr of a key or value is foreign code and may change the dictionary.
        for key, item in list(value.items()):
            if self.left < 0:
                return 0
            if not first:
                self.put(", ")
            first = False
            self.put_value(key, depth + 1)
            self.put(": ")
            self.put_value(item, depth + 1)
        self.put("}")
        return 0

    cdef int put_value(self, object value, int depth) except -1:
        cdef type kind = type(value)
        if self.left < 0:
            return 0
        if kind is str or kind is bytes:
            # Cut before repr(): a message may carry megabytes.
            self.put(repr(value if len(value) <= self.left else value[:self.left + 1]))
        elif kind is tuple:
            self.put_items("(", value, ")", depth)
        elif kind is list:
            self.put_items("[", tuple(value), "]", depth)
        elif kind is dict:
            self.put_dict(value, depth)
        elif (kind is set or kind is frozenset) and value:
            self.put_items("{" if kind is set else "frozenset({", tuple(value), "}" if kind is set else "})", depth)
        else:
            self.put(foreign_repr(value))
        return 0


cdef str foreign_repr(object value):
    """repr() of anything; it may be foreign code, so it may fail, and return text that has no UTF-8 form."""
    try:
        text = repr(value)
    except Exception as problem:
        return f"<{type(value).__name__}: no repr, {type(problem).__name__}>"
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


cdef bint is_short_scalar(object value) noexcept:
    cdef type kind = type(value)
    cdef int overflow = 0
    if kind is str:
        return len(<str> value) <= SAMPLE_TEXT
    if kind is int:
        PyLong_AsLongLongAndOverflow(value, &overflow)
        return overflow == 0
    return value is None or kind is bool or kind is float


cdef bint is_short(tuple values) noexcept:
    cdef Py_ssize_t i
    if PyTuple_GET_SIZE(values) > SAMPLE_ITEMS:
        return False
    for i in range(PyTuple_GET_SIZE(values)):
        if not is_short_scalar(<object> PyTuple_GET_ITEM(values, i)):
            return False
    return True


def short_repr(value, Py_ssize_t limit=1024) -> str:
    """Return ``repr(value)`` cut to about ``limit`` characters and three levels; never raises."""
    cdef Excerpt excerpt
    if limit >= 1024 and type(value) is tuple and is_short(<tuple> value):
        # 8 x 64 characters stay below the limit unless each needs an escape of ten: then cut.
        text = repr(value)
        if len(text) <= limit:
            return text
    excerpt = Excerpt()
    excerpt.parts = []
    excerpt.left = limit
    excerpt.put_value(value, 0)
    return "".join(excerpt.parts)
