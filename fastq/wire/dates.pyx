# cython: language_level=3, cdivision=True
"""Dates as text: ISO 8601 to unix time and back, in every form that Celery's reader takes; and the clock. No time zones' rules."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.math cimport NAN, floor
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from fastq.errors import EncodeError

cdef enum:
    MAX_DATE = 128      # chosen: longer texts are not read as a date
    NO_ZONE = 86400     # no offset is a whole day

#: Midnight of 0001-01-01 and the last second of 9999: what Python's dates can hold.
cdef int64_t FIRST_SECOND = -62135596800
cdef int64_t LAST_SECOND = 253402300799


cdef double read_clock() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


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
