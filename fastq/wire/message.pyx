# cython: language_level=3, cdivision=True
"""Task message protocol 2: encode it, and scan what the worker decides on out of its encoded properties.

No sockets; the clock is read for ``expiration`` and ids. Properties are AMQP 0-9-1 basic properties (specification 4.2.5 and
1.8.3.1), the layout of the headers is Celery's protocol 2. Full decoding is in ``wire.properties``.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.math cimport NAN, floor
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from fastq.wire.buffer cimport Writer, load_double, load_float, load_u16, load_u32, load_u64, store_u16, store_u32
from fastq.wire.properties cimport (
    HAS_APP_ID, HAS_CLUSTER_ID, HAS_CONTENT_ENCODING, HAS_CONTENT_TYPE, HAS_CORRELATION_ID, HAS_DELIVERY_MODE,
    HAS_EXPIRATION, HAS_HEADERS, HAS_MESSAGE_ID, HAS_PRIORITY, HAS_REPLY_TO, HAS_TIMESTAMP, HAS_TYPE, HAS_USER_ID)

from fastq.errors import EncodeError
from fastq.wire.properties import decode_properties

cdef enum:
    MAX_NAME = 1024     # chosen: longer task names and ids are not task messages
    MAX_DEPTH = 32      # specified: reliability rules, section 6.1
    MAX_DATE = 128      # chosen: longer texts are not read as a date
    MAX_NUMBER = 24     # chosen: longer texts are not read as a number
    NO_ZONE = 86400     # no offset is a whole day

#: Midnight of 0001-01-01 and the last second of 9999: what Python's dates can hold.
cdef int64_t FIRST_SECOND = -62135596800
cdef int64_t LAST_SECOND = 253402300799

#: What a message was refused for, by the numbers ``scan_head`` returns; also the names under which they are counted.
PROBLEMS = ("fine", "properties", "no-task", "task", "no-id", "id", "eta", "expires", "timelimit", "retries")


cdef double read_clock() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


# --- dates ------------------------------------------------------------------------------------------------------------

cdef int64_t days_from_civil(int64_t year, int64_t month, int64_t day) noexcept nogil:
    """Days since 1970-01-01 in the proleptic Gregorian calendar (years count from March, in eras of 400 years)."""
    cdef int64_t era, year_of_era, day_of_year
    if month <= 2:
        year -= 1
    era = year // 400
    year_of_era = year - era * 400
    day_of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return era * 146097 + year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year - 719468


cdef int digits(const uint8_t *p, int count) noexcept nogil:
    """The value of ``count`` decimal digits, -1 when one is not a digit."""
    cdef int value = 0
    cdef int i
    for i in range(count):
        if p[i] < c'0' or p[i] > c'9':
            return -1
        value = value * 10 + (p[i] - c'0')
    return value


cdef double parse_usual(const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """Unix seconds of ``YYYY-MM-DDTHH:MM:SS[.f…][Z|±HH[:]MM]`` (no zone: UTC), NaN when it is anything else."""
    cdef int year, month, day, hour, minute, second, zone
    cdef double value
    cdef Py_ssize_t i = 19
    if size < 19 or p[4] != c'-' or p[7] != c'-' or (p[10] != c'T' and p[10] != c' ') or p[13] != c':' or p[16] != c':':
        return NAN
    year, month, day = digits(p, 4), digits(p + 5, 2), digits(p + 8, 2)
    hour, minute, second = digits(p + 11, 2), digits(p + 14, 2), digits(p + 17, 2)
    if not is_day(year, month, day) or hour < 0 or hour > 23 or minute < 0 or minute > 59 or second < 0 or second > 60:
        return NAN
    value = <double> (days_from_civil(year, month, day) * 86400 + hour * 3600 + minute * 60 + second)
    if i < size and p[i] == c'.':
        value += read_fraction(p, size, &i)
    zone = read_zone(p + i, size - i)
    return value - zone if zone != NO_ZONE else NAN


cdef bint is_day(int year, int month, int day) noexcept nogil:
    if year < 1 or month < 1 or month > 12 or day < 1:
        return False
    if month == 2:
        return day <= (29 if is_leap(year) else 28)
    return day <= (30 if month == 4 or month == 6 or month == 9 or month == 11 else 31)


cdef bint is_leap(int year) noexcept nogil:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


cdef double read_fraction(const uint8_t *p, Py_ssize_t size, Py_ssize_t *at) noexcept nogil:
    """The value of the digits behind a decimal mark, which ``at`` points to and is moved behind."""
    cdef double value = 0, scale = 0.1
    cdef Py_ssize_t i = at[0] + 1
    while i < size and c'0' <= p[i] <= c'9':
        value += (p[i] - c'0') * scale
        scale *= 0.1
        i += 1
    at[0] = i
    return value


cdef int read_zone(const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """Seconds east of UTC of a whole ``Z``, ``±HH``, ``±HHMM``, ``±HH:MM`` or nothing; NO_ZONE when it is anything else."""
    cdef int hour, minute = 0
    if size == 0 or (size == 1 and (p[0] == c'Z' or p[0] == c'z')):
        return 0
    if (p[0] != c'+' and p[0] != c'-') or (size != 3 and size != 5 and size != 6) or (size == 6 and p[3] != c':'):
        return NO_ZONE
    hour = digits(p + 1, 2)
    if size > 3:
        minute = digits(p + size - 2, 2)
    if hour < 0 or hour > 23 or minute < 0 or minute > 59:
        return NO_ZONE
    return (hour * 3600 + minute * 60) * (1 if p[0] == c'+' else -1)


cdef Py_ssize_t count_digits(const uint8_t *p, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i < size and c'0' <= p[i] <= c'9':
        i += 1
    return i


cdef Py_ssize_t read_day(const uint8_t *p, Py_ssize_t size, int64_t *days, bint *is_whole) noexcept nogil:
    """Put the days since 1970 of the date that a text begins with into ``days``; returns its length, 0 when it is none.

    ``YYYY``, ``YYYY-MM``, ``YYYY[-]MM[-]DD``, ``YYYY[-]DDD``, ``YYYY[-]Www[[-]D]``. A time may follow a whole day only.
    """
    cdef int year, month = 1, day = 1, week
    cdef int64_t first
    cdef bint has_dash = size > 4 and p[4] == c'-'
    cdef Py_ssize_t at = 5 if has_dash else 4, length
    is_whole[0] = True
    if size < 4:
        return 0
    year = digits(p, 4)
    if size > at and p[at] == c'W':
        week = digits(p + at + 1, 2) if size >= at + 3 else -1
        at += 3
        is_whole[0] = size > at
        if size > at and (p[at] == c'-') == has_dash:
            at += 1 if has_dash else 0
            day = digits(p + at, 1) if size > at else -1
            at += 1
        elif size > at:
            return 0
        if year < 1 or week < 1 or week > 53 or day < 1 or day > 7:
            return 0
        # The week of January 4th is the first; 1970-01-05 was a Monday.
        first = days_from_civil(year, 1, 4)
        days[0] = first - ((first - 4) % 7 + 7) % 7 + (week - 1) * 7 + day - 1
        return at
    length = count_digits(p + at, size - at)
    if length == 3:
        day = digits(p + at, 3)
        if year < 1 or day < 1 or day > (366 if is_leap(year) else 365):
            return 0
        days[0] = days_from_civil(year, 1, 1) + day - 1
        return at + 3
    if not has_dash and length == 4:
        month, day = digits(p + 4, 2), digits(p + 6, 2)
        at = 8
    elif has_dash and length == 2:
        month = digits(p + 5, 2)
        at = 7
        if size > at:
            day = digits(p + 8, 2) if size >= 10 and p[7] == c'-' else -1
            at = 10
        else:
            is_whole[0] = False
    elif size != 4:
        return 0
    if not is_day(year, month, day):
        return 0
    days[0] = days_from_civil(year, month, day)
    return at


cdef double parse_iso8601(const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """Unix seconds of an ISO 8601 date in any form that Celery reads (no zone: UTC), NaN when it is none.

    The usual one is tried first; the others are ``read_day`` and, behind any one character, ``HH[[:]MM[[:]SS[.f…|,f…]]]``
    with a zone.
    """
    cdef double value = parse_usual(p, size)
    cdef int64_t days = 0
    cdef int part[3]
    cdef int count, zone
    cdef bint is_whole, has_colon = False
    cdef Py_ssize_t at
    if value == value or size > MAX_DATE:
        return value
    at = read_day(p, size, &days, &is_whole)
    if at == 0:
        return NAN
    if at == size:
        return <double> (days * 86400)
    if not is_whole or size - at < 3 or c'0' <= p[at] <= c'9':
        return NAN
    at += 1
    value = 0
    part[0] = part[1] = part[2] = 0
    for count in range(3):
        if at == size or p[at] == c'Z' or p[at] == c'z' or p[at] == c'+' or p[at] == c'-':
            break
        if count == 1:
            has_colon = p[at] == c':'
        if count > 0 and has_colon:
            if p[at] != c':':
                return NAN
            at += 1
        part[count] = digits(p + at, 2) if size - at >= 2 else -1
        at += 2
        if part[count] < 0:
            return NAN
        if count == 2 and at + 1 < size and (p[at] == c'.' or p[at] == c',') and count_digits(p + at + 1, 1):
            value = read_fraction(p, size, &at)
    if part[0] > 24 or part[1] > 59 or part[2] > 60 or (part[0] == 24 and (part[1] or part[2] or value)):
        return NAN
    zone = read_zone(p + at, size - at)
    if zone == NO_ZONE:
        return NAN
    return value + <double> (days * 86400 + part[0] * 3600 + part[1] * 60 + part[2] - zone)


cdef bytes format_iso8601(double unix):
    """``YYYY-MM-DDTHH:MM:SS.ffffff+00:00``, as Celery writes dates in headers."""
    cdef int64_t whole = <int64_t> floor(unix)
    cdef int micro = <int> ((unix - whole) * 1e6 + 0.5)
    cdef int64_t days, z, era, doe, yoe, doy, mp, year, month, day, seconds
    if micro >= 1000000:
        whole += 1
        micro -= 1000000
    if not FIRST_SECOND <= whole <= LAST_SECOND:
        raise EncodeError(f"date out of range: unix time {unix!r} is not between the years 1 and 9999")
    # From the year 1 on: C rounds negative quotients up.
    days, seconds = (whole - FIRST_SECOND) // 86400 + FIRST_SECOND // 86400, (whole - FIRST_SECOND) % 86400
    z = days + 719468
    era = z // 146097
    doe = z - era * 146097
    yoe = (doe - doe // 1460 + doe // 36524 - doe // 146096) // 365
    doy = doe - (365 * yoe + yoe // 4 - yoe // 100)
    mp = (5 * doy + 2) // 153
    day = doy - (153 * mp + 2) // 5 + 1
    month = mp + 3 if mp < 10 else mp - 9
    year = yoe + era * 400 + (1 if month <= 2 else 0)
    return b"%04d-%02d-%02dT%02d:%02d:%02d.%06d+00:00" % (
        year, month, day, seconds // 3600, seconds % 3600 // 60, seconds % 60, micro)


def iso8601_to_unix(text: bytes) -> float | None:
    """Return the unix time of an ISO 8601 date in bytes, None when it is not one."""
    cdef double value = parse_iso8601(<const uint8_t *> PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return None if value != value else value


def unix_to_iso8601(double unix) -> str:
    """Return a unix time as Celery writes dates in message headers."""
    return format_iso8601(unix).decode("ascii")


# --- scanning ---------------------------------------------------------------------------------------------------------

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
    }


# --- encoding ---------------------------------------------------------------------------------------------------------

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
        return Message(self.exchange, self.routing_key, out.take(), body, task_id, self.priority, self.eta, self.expires)


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


# --- a call in the child ----------------------------------------------------------------------------------------------

cdef class Call:
    """A delivery as the child sees it: who is to run, with the body and the properties still encoded."""

    def properties(self) -> dict[str, object]:
        """Return all message properties; decoded on first use."""
        if self._properties is None:
            self._properties = decode_properties(self.props, False)
        return self._properties

    @property
    def started_s(self) -> float:
        """When it started, on the monotonic clock in seconds."""
        return self.started_ns * 1e-9

    def headers(self) -> dict[str, object]:
        """Return all message headers; decoded on first use."""
        return self.properties().get("headers") or {}

    def success_meta(self, bytes value) -> bytes | None:
        """Return the stored form of a success with this encoded value, None when the id needs escaping in JSON."""
        cdef Py_ssize_t id_size, i
        cdef const char *id_text
        cdef Py_ssize_t value_size = PyBytes_GET_SIZE(value)
        cdef bytes out
        cdef char *p
        if not self.id.isascii():
            return None
        id_text = PyUnicode_AsUTF8AndSize(self.id, &id_size)
        for i in range(id_size):
            if not (c'a' <= id_text[i] <= c'z' or c'0' <= id_text[i] <= c'9' or c'A' <= id_text[i] <= c'Z' or id_text[i] == c'-'
                    or id_text[i] == c'_' or id_text[i] == c'.'):
                return None
        out = PyBytes_FromStringAndSize(NULL, 29 + value_size + 45 + 32 + 13 + id_size + 2)
        p = PyBytes_AS_STRING(out)
        memcpy(p, b'{"status":"SUCCESS","result":', 29)
        memcpy(p + 29, PyBytes_AS_STRING(value), value_size)
        p += 29 + value_size
        memcpy(p, b',"traceback":null,"children":[],"date_done":"', 45)
        memcpy(p + 45, PyBytes_AS_STRING(format_iso8601(read_clock())), 32)
        memcpy(p + 77, b'","task_id":"', 13)
        memcpy(p + 90, id_text, id_size)
        memcpy(p + 90 + id_size, b'"}', 2)
        return out

    def __repr__(self):
        return f"<Call {self.name}[{self.id}]>"
