"""The head of a task message: declarations. Spans point into the property bytes that were scanned."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef struct Span:
    uint32_t offset
    uint32_t length


cdef enum Problem:
    FINE = 0
    BAD_PROPERTIES
    NO_TASK
    BAD_TASK
    NO_ID
    BAD_ID
    BAD_ETA
    BAD_EXPIRES
    BAD_TIMELIMIT
    BAD_RETRIES
    BAD_DEATHS
    PROBLEM_COUNT


# What the worker's main process decides on; everything else stays encoded.
cdef struct Head:
    Span task
    Span id
    Span reply_to
    Span correlation_id
    double eta              # unix seconds, 0 = none
    double expires          # unix seconds, 0 = none
    double time_limit       # seconds, 0 = no limit, -1 = not said
    double soft_time_limit
    int64_t retries
    int64_t delivery_count  # RabbitMQ's count on quorum queues: former deliveries, 0 = first
    int priority
    int ignore_result       # -1 = not said
    bint compressed


cdef int scan_head(const uint8_t *props, Py_ssize_t size, Head *head) noexcept nogil
cdef bint breaks_dead_letters(const uint8_t *props, Py_ssize_t size) noexcept nogil
cdef bint is_utf8(const uint8_t *p, Py_ssize_t size) noexcept
cdef str read_text(const char *text, Py_ssize_t size)
