# cython: language_level=3
"""RabbitMQ's hot half, compiled: bytes to deliveries, verdicts to bytes. No decisions about tasks, no handshakes.

``AmqpLink`` is an asyncio.BufferedProtocol: it scans the three frames of a delivery in place and hands every other method to
its cold half, in Python.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memmove
from posix.time cimport nanosleep, timespec

from fastq.link cimport ACK, REJECT, Delivery, Sink, Source
from fastq.wire.buffer cimport Writer, load_u16, load_u32, load_u64
from fastq.wire.frames cimport (
    BASIC_ACK, BASIC_DELIVER, BASIC_NACK, BASIC_RETURN, FRAME_BODY, FRAME_END, FRAME_HEADER, FRAME_HEARTBEAT, FRAME_METHOD,
    FRAME_OVERHEAD, put_ack, put_message, put_nack)
from fastq.wire.head cimport breaks_dead_letters
from fastq.wire.message cimport Message
from fastq.wire.pipe cimport monotonic_ns

from fastq.errors import RemoteProtocolError

cdef enum:
    BUFFER_BYTES = 1 << 18      # two of the largest frames that are agreed on
    HEADER_SLACK = 1 << 15
    BATCH = 32                  # messages per read that are worth waiting for
    MODERATE_FROM = 4000        # messages a second: far above what call-and-wait clients make
    RATE_SPAN_NS = 10000000
    LONGEST_PAUSE_NS = 1000000


cdef class Channel(AckWindow):
    def __init__(self, int number):
        self.number = number


cdef class AmqpLink(Source):
    """One AMQP connection's bytes. The cold half sets ``on_method``, ``on_lost`` and the channels, and reads the clocks."""

    def __init__(self, Sink core=None):
        self.sink = core
        self.frame_max = 131072
        self.max_message_bytes = 128 << 20
        self.publish_channel = 1
        self.buffer = bytearray(BUFFER_BYTES)
        self.view = memoryview(self.buffer)
        self.out = Writer()
        self.channels = {}
        self.owing = []
        self.unconfirmed = {}
        self.known_queues = set()
        self.held_back = {}
        self.content_exchange = self.content_routing_key = self.content_consumer = b""
        self.window = 0

    # --- asyncio.BufferedProtocol

    def connection_made(self, transport: object) -> None:
        self.transport = transport
        self.write_bytes = transport.write
        self.received_at = self.sent_at = monotonic_ns() * 1e-9

    def get_buffer(self, Py_ssize_t sizehint) -> object:
        return self.view if self.end == 0 else self.view[self.end:]

    def buffer_updated(self, Py_ssize_t count) -> None:
        cdef Py_ssize_t before = self.arrived
        self.end += count
        self.received_at = monotonic_ns() * 1e-9
        try:
            self.parse()
            if self.sink is not None:
                self.sink.on_batch()
            if self.held_bytes > self.max_held_bytes and not self.is_paused and not self.dead:
                self.is_paused = True
                self.transport.pause_reading()
            if self.arrived != before:
                self.moderate(self.arrived - before)
        except RemoteProtocolError as error:
            self.fail(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.dead = True
        if self.on_lost is not None:
            on_lost, self.on_lost = self.on_lost, None
            on_lost(exc)
        self.let_go()

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass

    cdef int let_go(self) except -1:
        """Keep nothing of the connection but what was not confirmed: the collector, which finds cycles, is rarely asked."""
        self.on_method = self.on_returned = self.on_unknown_queue = self.postpone = self.dead_letter = None
        self.transport = self.write_bytes = self.view = None
        self.buffer = bytearray()
        return 0

    # --- for the cold half

    def write(self, bytes data) -> None:
        """Send bytes that are frames already; nothing when the connection is gone."""
        if self.write_bytes is None:
            return
        if self.out.size:
            self.write_out()
        self.sent_at = monotonic_ns() * 1e-9
        self.write_bytes(data)

    def close(self) -> None:
        """Flush and close."""
        if self.transport is not None:
            if not self.dead:
                self.flush(True)
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        self.dead = True
        if self.transport is not None:
            self.transport.abort()
        else:
            self.let_go()

    def fail(self, error: Exception) -> None:
        """End the connection because of ``error``."""
        if self.on_lost is not None:
            on_lost, self.on_lost = self.on_lost, None
            self.abort()
            on_lost(error)
        else:
            self.abort()

    def add_channel(self, int number) -> None:
        """Deliveries may come by this channel, which was just opened."""
        self.channels[number] = Channel(number)

    def drop_channel(self, int number) -> None:
        """The channel is closed, or about to be."""
        self.channels.pop(number, None)
        self.content_channel = None

    def idle_channels(self) -> list[int]:
        """Return the numbers of those channels of which nothing is here unsettled, nor owed to the broker."""
        return [
            number for number, channel in self.channels.items()
            if (<Channel> channel).is_idle() and (<Channel> channel).owed_count == 0
        ]

    def start_confirms(self, int channel) -> None:
        """The channel is in confirm mode: count what is published on it."""
        self.publish_channel = channel
        self.confirming = True

    def publish(self, list messages) -> None:
        """Publish (token, Message) pairs; nobody is told of their confirmation."""
        for _, message in messages:
            self.send(message, None)
        self.flush(True)

    def take_unconfirmed(self) -> list[tuple[Message, object]]:
        """Return and forget what was published and never confirmed, oldest first: (Message, owner)."""
        cdef list left = [self.unconfirmed[tag] for tag in sorted(self.unconfirmed)]
        for held in self.held_back.values():
            left += held
        self.unconfirmed = {}
        self.held_back = {}
        return left

    def queue_known(self, str name) -> None:
        """The queue exists: send what was held back for it, and from now on send at once."""
        self.known_queues.add(name)
        for message, owner in self.held_back.pop(name, ()):
            self.send_now(<Message> message, <Delivery> owner)
        self.flush(True)

    # --- bytes to deliveries

    @cython.boundscheck(False)
    cdef int parse(self) except -1:
        """Handle the whole frames in the buffer and move what is left to its start."""
        cdef const uint8_t *p = <const uint8_t *> PyByteArray_AS_STRING(self.buffer)
        cdef Py_ssize_t at = 0, payload
        while self.end - at >= 7:
            payload = load_u32(p + at + 3)
            # RabbitMQ adds x-death or x-delivery-count to a message whose headers filled a frame, and sends it all the same.
            if payload + FRAME_OVERHEAD > self.frame_max + (HEADER_SLACK if p[at] == FRAME_HEADER else 0):
                raise RemoteProtocolError(
                    f"the broker announced a frame of {payload + FRAME_OVERHEAD} bytes, at most {self.frame_max} were agreed on")
            if self.end - at < payload + FRAME_OVERHEAD:
                break
            if p[at + 7 + payload] != FRAME_END:
                raise RemoteProtocolError(f"a frame does not end in 0xCE but in 0x{p[at + 7 + payload]:02X}")
            self.on_frame(p[at], load_u16(p + at + 1), p + at + 7, payload)
            at += payload + FRAME_OVERHEAD
        self.end -= at
        if at and self.end:
            memmove(PyByteArray_AS_STRING(self.buffer), p + at, self.end)
        return 0

    cdef int on_frame(self, uint8_t kind, uint16_t channel, const uint8_t *p, Py_ssize_t size) except -1:
        cdef uint32_t method
        cdef Py_ssize_t room
        if kind == FRAME_METHOD:
            if size < 4:
                raise RemoteProtocolError(f"method frame of {size} bytes")
            if self.content:
                raise RemoteProtocolError("a method came where a message's content was due")
            method = load_u32(p)
            if method == BASIC_DELIVER:
                return self.on_deliver(channel, p + 4, size - 4)
            if (method == BASIC_ACK or method == BASIC_NACK) and self.confirming and channel == self.publish_channel:
                if size < 13:
                    raise RemoteProtocolError(f"confirm of {size} bytes")
                return self.on_confirm(load_u64(p + 4), p[12] & 1, method == BASIC_ACK)
            if method == BASIC_RETURN:
                self.content = BASIC_RETURN
                self.content_arguments = PyBytes_FromStringAndSize(<const char *> p + 4, size - 4)
                return 0
            if self.on_method is not None:
                self.on_method(channel, method, PyBytes_FromStringAndSize(<const char *> p + 4, size - 4))
        elif kind == FRAME_HEADER:
            if not self.content:
                raise RemoteProtocolError("a content header came without its method")
            return self.on_header(p, size)
        elif kind == FRAME_BODY:
            if not self.content or self.content_props is None:
                raise RemoteProtocolError("a body frame came without its header")
            room = <Py_ssize_t> self.body_size - self.body_got
            if size > room:
                raise RemoteProtocolError(f"a message's body is {size - room} bytes longer than its header said")
            self.body_got += size
            if <uint64_t> self.body_got < self.body_size:
                # Memory grows with what has really come, not with what was announced.
                if self.content_oversized:
                    return 0
                if self.content_parts is None:
                    self.content_parts = []
                self.content_parts.append(PyBytes_FromStringAndSize(<const char *> p, size))
                return 0
            self.content_body = b"" if self.content_oversized else PyBytes_FromStringAndSize(<const char *> p, size)
            if self.content_parts is not None:
                self.content_parts.append(self.content_body)
                self.content_body = b"".join(self.content_parts)
                self.content_parts = None
            return self.on_content()
        elif kind != FRAME_HEARTBEAT:
            raise RemoteProtocolError(f"frame of unknown type {kind}")
        return 0

    @cython.boundscheck(False)
    cdef int on_deliver(self, uint16_t channel, const uint8_t *p, Py_ssize_t size) except -1:
        """basic.deliver: consumer tag, delivery tag, redelivered, exchange, routing key."""
        cdef Py_ssize_t at, length
        if size < 1 or size < 1 + p[0] + 9 + 1:
            raise RemoteProtocolError(f"basic.deliver of {size} bytes is too short")
        at = 1 + p[0]
        if p[0] != PyBytes_GET_SIZE(self.content_consumer) or memcmp(PyBytes_AS_STRING(self.content_consumer), p + 1, p[0]) != 0:
            self.content_consumer = PyBytes_FromStringAndSize(<const char *> p + 1, p[0])
        self.content_tag = load_u64(p + at)
        self.content_redelivered = p[at + 8] & 1
        at += 9
        length = p[at]
        if at + 1 + length + 1 > size:
            raise RemoteProtocolError("basic.deliver ends inside the exchange name")
        if length != PyBytes_GET_SIZE(self.content_exchange) or memcmp(
                PyBytes_AS_STRING(self.content_exchange), p + at + 1, length) != 0:
            self.content_exchange = PyBytes_FromStringAndSize(<const char *> p + at + 1, length)
        at += 1 + length
        length = p[at]
        if at + 1 + length > size:
            raise RemoteProtocolError("basic.deliver ends inside the routing key")
        if length != PyBytes_GET_SIZE(self.content_routing_key) or memcmp(
                PyBytes_AS_STRING(self.content_routing_key), p + at + 1, length) != 0:
            self.content_routing_key = PyBytes_FromStringAndSize(<const char *> p + at + 1, length)
        self.content = BASIC_DELIVER
        self.content_number = channel
        if self.sink is not None and (self.content_channel is None or self.content_channel.number != channel):
            self.content_channel = self.channels.get(channel)
            if self.content_channel is None:
                raise RemoteProtocolError(f"a delivery came on channel {channel}, where nothing was asked for")
        return 0

    cdef int on_header(self, const uint8_t *p, Py_ssize_t size) except -1:
        if size < 14:
            raise RemoteProtocolError(f"content header of {size} bytes")
        self.body_size = load_u64(p + 4)
        # Too large to be kept: its body is read past, and the core rejects it like any other message that cannot be run.
        self.content_oversized = self.body_size > <uint64_t> self.max_message_bytes
        if self.body_size > <uint64_t> 1 << 62:
            raise RemoteProtocolError(f"a content header announces {self.body_size} bytes")
        self.content_props = PyBytes_FromStringAndSize(<const char *> p + 12, size - 12)
        self.content_body = None
        self.body_got = 0
        if self.body_size == 0:
            self.content_body = b""
            return self.on_content()
        return 0

    cdef int on_content(self) except -1:
        """A message is complete."""
        cdef Delivery delivery
        cdef int what = self.content
        self.content = 0
        if what == BASIC_RETURN:
            self.mark_returned()
            props, self.content_props, self.content_body = self.content_props, None, None
            if self.on_returned is not None:
                self.on_returned({"arguments": self.content_arguments, "props": props})
            return 0
        delivery = Delivery.__new__(Delivery)
        delivery.tag = self.content_tag
        delivery.exchange = self.content_exchange
        delivery.routing_key = self.content_routing_key
        delivery.consumer = self.content_consumer
        delivery.props = self.content_props
        delivery.body = self.content_body
        delivery.deliveries = 2 if self.content_redelivered else 1
        delivery.oversized = self.content_oversized
        self.content_props = self.content_body = None
        if self.sink is None:
            if self.on_method is not None:
                self.on_method(self.content_number, BASIC_DELIVER, (delivery.tag, delivery.props, delivery.body))
            return 0
        delivery.channel = self.content_channel
        delivery.channel.received(delivery.tag)
        self.arrived += 1
        return self.give(delivery)

    cdef int moderate(self, Py_ssize_t count) except -1:
        """Under a fast stream of small reads let more arrive before the next one, as network cards do with their interrupts.

        Each read costs system calls and wake-ups on three processes, so batches decide what a message costs. It happens only
        above MODERATE_FROM messages a second, for a millisecond at most, and while the broker has plenty of room to send.
        """
        cdef int64_t now = monotonic_ns()
        cdef timespec pause
        if now - self.rate_since > RATE_SPAN_NS:
            self.rate = self.arrived * 1e9 / <double> (now - self.rate_since)
            self.rate_since = now
            self.arrived = 0
        if count >= BATCH or self.rate < MODERATE_FROM or (self.window and self.window - self.held < 4 * BATCH):
            return 0
        pause.tv_sec = 0
        pause.tv_nsec = <long> (BATCH * 1e9 / self.rate)
        if pause.tv_nsec > LONGEST_PAUSE_NS:
            pause.tv_nsec = LONGEST_PAUSE_NS
        with nogil:
            nanosleep(&pause, NULL)
        return 0

    # --- verdicts to bytes

    cdef int tell(self, Delivery delivery, int verdict) except -1:
        cdef Channel channel
        self.forget(delivery)
        if self.dead:
            return 0
        if self.is_paused and 2 * self.held_bytes < self.max_held_bytes:
            self.is_paused = False
            self.received_at = monotonic_ns() * 1e-9
            self.transport.resume_reading()
        channel = <Channel> delivery.channel
        if verdict == REJECT and breaks_dead_letters(
                <const uint8_t *> PyBytes_AS_STRING(delivery.props), PyBytes_GET_SIZE(delivery.props)):
            verdict = ACK   # one dead letter less; else the queue would be lost, with all that is in it
        if verdict == ACK:
            channel.settled(delivery.tag, True)
            if self.owed_count == 64:
                self.write_acks()
            if channel.owed_count == 0:
                self.owing.append(channel)
            channel.owed[channel.owed_count] = delivery.tag
            channel.owed_count += 1
            self.owed_count += 1
        else:
            put_nack(self.out, <uint16_t> channel.number, delivery.tag, verdict != REJECT)
            channel.settled(delivery.tag, False)
        return 0

    cdef int write_acks(self) except -1:
        """For each channel one ack for the contiguous prefix, one each for finished tags beyond a gap."""
        cdef Channel channel
        cdef uint64_t prefix
        cdef int i
        for each in self.owing:
            channel = <Channel> each
            prefix = channel.take_prefix()
            if prefix:
                put_ack(self.out, <uint16_t> channel.number, prefix, True)
            for i in range(channel.owed_count):
                if not channel.is_covered(channel.owed[i]):
                    put_ack(self.out, <uint16_t> channel.number, channel.owed[i], False)
                    channel.settled(channel.owed[i], False)
            channel.owed_count = 0
        self.owing.clear()
        self.owed_count = 0
        return 0

    cdef bint owes(self) noexcept:
        return self.owed_count > 0

    cdef int flush(self, bint now) except -1:
        if self.dead:
            self.owing.clear()
            self.owed_count = 0
            return self.write_out()
        # Half the window is the latest moment that keeps the broker sending.
        if self.owed_count and (now or self.owed_count >= 64 or (self.window and 2 * self.owed_count >= self.window)):
            self.write_acks()
        if self.out.size:
            self.write_out()
        return 0

    cdef int write_out(self) except -1:
        if self.dead:
            self.out.size = 0
            return 0
        self.sent_at = monotonic_ns() * 1e-9
        self.write_bytes(self.out.take())
        return 0

    # --- publishing with confirms

    cdef int send(self, Message message, Delivery owner) except -1:
        if owner is not None and message.id and not message.exchange and message.routing_key not in self.known_queues:
            # Declaring is the cold half's: the message waits here until the queue is known.
            held = self.held_back.get(message.routing_key)
            if held is not None:
                held.append((message, owner))
                return 0
            if self.on_unknown_queue is not None:
                self.held_back[message.routing_key] = [(message, owner)]
                self.on_unknown_queue(message.routing_key)
                return 0
        return self.send_now(message, owner)

    cdef int send_now(self, Message message, Delivery owner) except -1:
        # A follow-up must reach a queue; a reply whose asker has gone may be dropped.
        put_message(self.out, <uint16_t> self.publish_channel, message, self.frame_max, owner is not None and message.id != "")
        self.publish_tag += 1
        if self.confirming:
            self.unconfirmed[self.publish_tag] = (message, owner)
        elif owner is not None:
            self.sink.on_confirmed(owner, True)
        if self.out.size > 1 << 18:
            self.write_out()
        return 0

    cdef int on_confirm(self, uint64_t tag, bint multiple, bint stored) except -1:
        cdef uint64_t first = tag
        cdef uint64_t each
        cdef object entry
        if tag > self.publish_tag:
            raise RemoteProtocolError(f"the broker confirmed message {tag}, only {self.publish_tag} were published")
        if multiple:
            first = self.confirmed_to + 1
            self.confirmed_to = tag
        for each in range(first, tag + 1):
            entry = self.unconfirmed.pop(each, None)
            if entry is not None and entry[1] is not None:
                self.sink.on_confirmed(entry[1], stored and entry[0] is not None)
        return 0

    def mark_returned(self) -> None:
        """A message was returned as unroutable: its confirmation, which follows, counts as a refusal."""
        from fastq.wire.head import scan
        task_id = scan(self.content_props)["correlation_id"]
        for tag, (message, owner) in self.unconfirmed.items():
            if message is not None and message.id == task_id:
                self.unconfirmed[tag] = (None, owner)
                return
