"""Big-endian reads and a growable byte buffer: the primitives of every codec here. No protocol knowledge.

A ``Writer`` owns its memory; ``view`` and ``take`` are the only ways out. Pointers into it are valid until the next write.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint16_t load_u16(const uint8_t *p) noexcept nogil:
    return (<uint16_t> p[0] << 8) | p[1]


cdef inline uint32_t load_u32(const uint8_t *p) noexcept nogil:
    return (<uint32_t> p[0] << 24) | (<uint32_t> p[1] << 16) | (<uint32_t> p[2] << 8) | p[3]


cdef inline uint64_t load_u64(const uint8_t *p) noexcept nogil:
    return (<uint64_t> load_u32(p) << 32) | load_u32(p + 4)


cdef inline void store_u16(uint8_t *p, uint16_t value) noexcept nogil:
    p[0] = value >> 8
    p[1] = value & 0xFF


cdef inline void store_u32(uint8_t *p, uint32_t value) noexcept nogil:
    p[0] = value >> 24
    p[1] = (value >> 16) & 0xFF
    p[2] = (value >> 8) & 0xFF
    p[3] = value & 0xFF


cdef inline void store_u64(uint8_t *p, uint64_t value) noexcept nogil:
    store_u32(p, <uint32_t> (value >> 32))
    store_u32(p + 4, <uint32_t> value)


cdef inline float load_float(const uint8_t *p) noexcept nogil:
    cdef uint32_t raw = load_u32(p)
    cdef float value
    memcpy(&value, &raw, sizeof(value))
    return value


cdef inline double load_double(const uint8_t *p) noexcept nogil:
    cdef uint64_t raw = load_u64(p)
    cdef double value
    memcpy(&value, &raw, sizeof(value))
    return value


cdef inline void store_double(uint8_t *p, double value) noexcept nogil:
    cdef uint64_t raw
    memcpy(&raw, &value, sizeof(raw))
    store_u64(p, raw)


cdef class Writer:
    cdef uint8_t *data
    cdef Py_ssize_t size
    cdef Py_ssize_t capacity

    cdef int grow(self, Py_ssize_t extra) except -1

    cdef inline uint8_t *reserve(self, Py_ssize_t extra) except NULL:
        """Return where the next ``extra`` bytes go; the caller fills all of them."""
        cdef uint8_t *place
        if self.size + extra > self.capacity:
            self.grow(extra)
        place = self.data + self.size
        self.size += extra
        return place

    cdef inline int put_u8(self, uint8_t value) except -1:
        self.reserve(1)[0] = value
        return 0

    cdef inline int put_u16(self, uint16_t value) except -1:
        store_u16(self.reserve(2), value)
        return 0

    cdef inline int put_u32(self, uint32_t value) except -1:
        store_u32(self.reserve(4), value)
        return 0

    cdef inline int put_u64(self, uint64_t value) except -1:
        store_u64(self.reserve(8), value)
        return 0

    cdef inline int put(self, const void *source, Py_ssize_t length) except -1:
        if length:
            memcpy(self.reserve(length), source, length)
        return 0

    cdef inline int put_bytes(self, bytes data) except -1:
        return self.put(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef inline int put_double(self, double value) except -1:
        store_double(self.reserve(8), value)
        return 0

    cdef bytes take(self)
    cdef void clear(self) noexcept
