# cython: language_level=3
"""Where deliveries come from and verdicts go, compiled: what each broker's connection and the message loop share.

``BatchSource`` is the hot half of brokers whose I/O happens elsewhere: it crosses into Python once per batch. RabbitMQ's is
``brokers.rabbitmq.link``.
"""

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE

from fastq.errors import LocalProtocolError

cdef enum:
    MAX_HELD_BYTES = 256 << 20  # reliability rules, section 6.2
    MAX_UNSAVED_BYTES = 64 << 20    # reliability goals, scenario 29: results that wait for a store, with their messages
    UNSAVED_OVERHEAD = 1024     # measured by resident memory, 22,000 of them: a result, its delivery and their entries


@cython.freelist(1024)
cdef class Delivery:
    """A message as received: headers scanned, body and properties still encoded."""

    @property
    def is_own(self) -> bool:
        """Whether it is a call that the main process has made itself."""
        return self.source.is_own

    def describe(self) -> dict[str, object]:
        """Return what came with the message, for those who look at single deliveries: hooks, inspection."""
        return {
            "props": self.props, "body": self.body, "exchange": self.exchange.decode("utf-8", "replace"),
            "routing_key": self.routing_key.decode("utf-8", "replace"), "deliveries": self.deliveries,
            "consumer": None if self.consumer is None else self.consumer.decode("utf-8", "replace"),
            "redelivered": self.deliveries > 1, "acknowledged": bool(self.settled), "eta": self.head.eta or None,
        }


cdef class Sink:
    cdef int on_delivery(self, Delivery delivery) except -1:
        return 0

    cdef int on_confirmed(self, Delivery delivery, bint stored) except -1:
        return 0

    cdef int on_batch(self) except -1:
        return 0


cdef class Source:
    """Base of what brings deliveries."""

    def __cinit__(self):
        self.max_held_bytes = MAX_HELD_BYTES

    cdef int bind(self, Sink sink) except -1:
        self.sink = sink
        return 0

    cdef int give(self, Delivery delivery) except -1:
        """Hand a delivery to the sink."""
        delivery.source = self
        self.held += 1
        self.held_bytes += PyBytes_GET_SIZE(delivery.props) + PyBytes_GET_SIZE(delivery.body)
        return self.sink.on_delivery(delivery)

    cdef int tell(self, Delivery delivery, int verdict) except -1:
        """Take the verdict on a delivery; the broker hears of it at the next flush."""
        return self.forget(delivery)

    cdef int forget(self, Delivery delivery) except -1:
        """The delivery does not count as held any more."""
        if delivery.shelved:
            delivery.shelved = False
            self.shelved -= 1
            return 0
        self.held -= 1
        self.held_bytes -= PyBytes_GET_SIZE(delivery.props) + PyBytes_GET_SIZE(delivery.body)
        return 0

    cdef Py_ssize_t most_for_later(self) noexcept:
        """How many bytes may wait here for their time: a few large messages would take the place of all others."""
        return self.max_held_bytes // 4

    cdef int shelve(self, Delivery delivery) except -1:
        """The delivery ran and can be settled only later: it takes no other's place meanwhile."""
        if not delivery.shelved and not delivery.settled:
            self.forget(delivery)
            delivery.shelved = True
            self.shelved += 1
        return 0

    cdef int send(self, Message message, Delivery owner) except -1:
        """Publish a message and report its confirmation on ``owner`` (None: nobody waits for it)."""
        raise LocalProtocolError("this source cannot publish")

    cdef int flush(self, bint now) except -1:
        """Send what is due; everything when ``now``."""
        return 0

    cdef bint owes(self) noexcept:
        """Whether verdicts wait for a flush."""
        return False


cdef class BatchSource(Source):
    """Hot half of a pull-type broker. Derive from it in Python and write ``pull``, ``settle``, ``save`` and ``publish``;
    the core calls each at most once per flush. Call ``receive``, ``published`` and ``publish_failed`` on the loop's thread."""

    def __init__(self):
        self.verdicts = []
        self.reasons = {}
        self.results = []
        self.messages = []
        self.owners = {}
        self.sent = {}
        self.unsaved = {}
        self.next_token = 1
        self.pulled = -1

    def receive(self, list rows) -> None:
        """Take deliveries: (tag, queue, props, body, deliveries counted so far including this one), and, where the message
        came through an exchange, this and its routing key."""
        cdef Delivery delivery
        for tag, queue, props, body, deliveries, *route in rows:
            delivery = Delivery.__new__(Delivery)
            delivery.tag = tag
            delivery.exchange = route[0] if route else b""
            delivery.routing_key = route[1] if route else queue
            delivery.consumer = queue
            delivery.props = props
            delivery.body = body
            delivery.deliveries = deliveries
            self.give(delivery)
        self.pulled = -1
        self.sink.on_batch()

    def published(self, list tokens) -> None:
        """The messages with these tokens are stored (or the results saved under them)."""
        cdef Delivery owner
        for token in tokens:
            owner = self.drop_token(token)
            if owner is not None:
                self.sink.on_confirmed(owner, True)
        self.sink.on_batch()

    def publish_failed(self, list tokens, str reason) -> None:
        """The messages with these tokens could not be stored."""
        cdef Delivery owner
        for token in tokens:
            owner = self.drop_token(token)
            if owner is not None:
                self.sink.on_confirmed(owner, False)
        self.sink.on_batch()

    def take_unconfirmed(self) -> list[tuple[Message, object]]:
        """Return and forget what was to be published and was never confirmed, oldest first: (Message, owner)."""
        cdef list left = [(message, self.owners.pop(token, None)) for token, message in self.sent.items()]
        self.sent = {}
        self.messages = []
        return left

    def take_unsaved(self) -> list[tuple[object, ...]]:
        """Return and forget results that were never confirmed, oldest first: (owner, task id, state, meta, reply_to)."""
        cdef list left = [(self.owners.pop(token, None), *result) for token, result in self.unsaved.items()]
        self.unsaved = {}
        self.unsaved_bytes = 0
        self.results = []
        return left

    def bury(self) -> None:
        """The connection is gone: nothing is carried out any more. Results are kept for ``take_unsaved``."""
        self.dead = True
        self.results = []
        self.shelve_unsaved()

    def look(self) -> None:
        """See, now and then, whether the oldest unconfirmed result is still the one of the last time."""
        cdef uint64_t oldest = 0
        for token in self.unsaved:
            oldest = token
            break
        self.is_stuck = oldest != 0 and oldest == self.oldest_seen
        self.oldest_seen = oldest
        if self.is_stuck:
            self.shelve_unsaved()

    def shelve_unsaved(self) -> None:
        """Have the deliveries that wait for their results to be confirmed take no other's place."""
        cdef Delivery owner
        for token in self.unsaved:
            owner = self.owners[token]
            if owner is not None:
                owner.source.shelve(owner)

    cdef Delivery drop_token(self, object token):
        """Forget a message or a result, and return the delivery that waits for it."""
        cdef Delivery owner = self.owners.pop(token, None)
        self.sent.pop(token, None)
        result = self.unsaved.pop(token, None)
        if result is not None:
            self.unsaved_bytes -= _weight(owner, <bytes> (<tuple> result)[2])
        return owner

    cdef int tell(self, Delivery delivery, int verdict) except -1:
        self.forget(delivery)
        if not self.dead:
            self.verdicts.append((delivery.tag, verdict))
            if verdict == REJECT:
                self.reasons[delivery.tag] = delivery.reason
        return 0

    def take_reasons(self, list tags) -> dict[str, list[int]]:
        """Return rejected deliveries by the reason (the task, its id, what was wrong). For ``settle``, which knows the tags."""
        cdef dict found = {}
        for tag in tags:
            found.setdefault(self.reasons.pop(tag, None) or "rejected", []).append(tag)
        return found

    cdef bint keep_result(self, Delivery delivery, str task_id, str state, bytes meta, str reply_to, bint confirm) except -1:
        """Take a result to save; ``confirm`` when the delivery is not ours, so that FIFO does not order save and settle.

        Returns whether a confirmation will come. Of what cannot be stored now a bounded amount is kept, the oldest.
        """
        cdef uint64_t token = 0
        cdef Py_ssize_t weight
        if confirm:
            weight = _weight(delivery, meta)
            if self.unsaved_bytes + weight > MAX_UNSAVED_BYTES:
                return False
            self.unsaved_bytes += weight
            token = self.next_token
            self.next_token += 1
            self.owners[token] = delivery
            self.unsaved[token] = (task_id, state, meta, reply_to)
            if (self.dead or self.is_stuck) and delivery is not None:
                delivery.source.shelve(delivery)
        if not self.dead:
            self.results.append((task_id, state, meta, reply_to, token))
        return confirm

    cdef int send(self, Message message, Delivery owner) except -1:
        self.owners[self.next_token] = owner
        self.sent[self.next_token] = message
        self.messages.append((self.next_token, message))
        self.next_token += 1
        return 0

    cdef bint owes(self) noexcept:
        return len(self.verdicts) > 0

    cdef int flush(self, bint now) except -1:
        cdef Py_ssize_t room
        if self.dead:
            return 0
        room = self.window - self.held
        if self.results:
            results, self.results = self.results, []
            self.save(results)
        if self.messages:
            messages, self.messages = self.messages, []
            self.publish(messages)
        if self.verdicts and (now or len(self.verdicts) >= 64 or 2 * len(self.verdicts) >= self.window):
            verdicts, self.verdicts = self.verdicts, []
            self.settle(verdicts)
            if self.reasons:    # of those that nobody keeps
                self.reasons.clear()
        if room < 0 or self.held_bytes > self.max_held_bytes:
            room = 0
        # Ask in large steps: each request costs the other side a transaction.
        if room != self.pulled and (2 * room >= self.window or self.pulled < 0):
            self.pulled = room
            self.pull(room)
        return 0


cdef Py_ssize_t _weight(Delivery delivery, bytes meta) except -1:
    """Return what a result that waits takes of memory, with the message of its task."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(meta) + UNSAVED_OVERHEAD
    if delivery is not None:
        size += PyBytes_GET_SIZE(delivery.props) + PyBytes_GET_SIZE(delivery.body)
    return size
