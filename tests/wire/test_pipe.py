"""The pipe between main process and child: calls in any pieces, records through the ring, and damaged memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from fastq.errors import LocalProtocolError
from fastq.wire.message import Message, encode_task
from fastq.wire.pipe import SHARED_SIZE, ChildPipe, RingReader, call_record

TASK = encode_task("tasks.add", "id-1", b"[[1],{},{}]")
OUTCOME = struct.Struct("=IBBHIIq")
HEAD_OFFSET, RING_OFFSET = 0, 4096


class Ends(NamedTuple):
    ours: socket.socket
    child: ChildPipe
    ring: RingReader
    shared: int


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    shared = os.memfd_create("test")
    os.ftruncate(shared, SHARED_SIZE)
    ours.settimeout(5)
    ring = RingReader(shared)
    yield Ends(ours, ChildPipe(theirs.fileno(), shared), ring, shared)
    ours.close()
    theirs.close()
    os.close(shared)


def record(seq: int, body: bytes = TASK.body) -> bytes:
    return call_record(
        seq,
        "exchange",
        "queue",
        TASK.props,
        body,
        wants_result=True,
        soft_time_limit=1.5,
        deliveries=2,
        redelivered=True,
    )


def test_a_main_process_that_goes_without_reading_ends_the_child(ends: Ends) -> None:
    ends.ours.sendall(record(1))
    call = ends.child.next()
    assert call is not None
    ends.child.finish(call, 0)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(ends.child.next)
        assert ends.ours.recv(1, socket.MSG_PEEK) == b"!"
        ends.ours.close()  # the bell is unread: the kernel resets the other side
        assert following.result(5) is None


def test_a_call_arrives_as_it_was_sent(ends: Ends) -> None:
    ends.ours.sendall(record(1))
    call = ends.child.next()
    assert call is not None
    assert (call.name, call.id, call.exchange, call.routing_key) == ("tasks.add", "id-1", "exchange", "queue")
    assert (call.props, call.body, call.wants_result, call.redelivered, call.deliveries) == (
        TASK.props,
        TASK.body,
        True,
        True,
        2,
    )
    assert (call.soft_time_limit, call.time_limit, call.json_body) == (1.5, 0, True)
    assert call.headers()["task"] == "tasks.add"
    assert ends.ring.started[0] == 1


def test_calls_arrive_byte_by_byte_and_many_at_once(ends: Ends) -> None:
    data = b"".join(record(seq) for seq in range(1, 4))

    def drip() -> None:
        for at in range(len(data)):
            ends.ours.sendall(data[at : at + 1])
        ends.ours.sendall(b"".join(record(seq) for seq in range(4, 500)))
        ends.ours.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=drip)
    thread.start()
    count = 0
    while ends.child.next() is not None:
        count += 1
    thread.join(5)
    assert count == 499
    assert ends.child.stopped


@pytest.mark.parametrize("size", [0, 70_000, 5_000_000])
def test_a_body_of_any_size_arrives(ends: Ends, size: int) -> None:
    thread = threading.Thread(target=lambda: ends.ours.sendall(record(1, b"x" * size) + record(2)))
    thread.start()
    first, second = ends.child.next(), ends.child.next()
    thread.join(5)
    assert first is not None
    assert first.body == b"x" * size
    assert second is not None
    assert second.body == TASK.body


def test_an_outcome_carries_result_and_reason(ends: Ends) -> None:
    ends.ours.sendall(record(7))
    call = ends.child.next()
    assert call is not None
    ends.child.finish(call, 1, b'{"a":1}', "why")
    data = ends.ring.take()
    assert data is not None
    size, kind, state, flags, seq, meta_size, runtime_ns = OUTCOME.unpack_from(data)
    assert (size, kind, state, flags, seq, meta_size) == (len(data), 3, 1, 0, 7, 7)
    assert data[OUTCOME.size :] == b'{"a":1}why'
    assert runtime_ns > 0
    assert ends.ring.take() is None


def test_the_ring_wraps_with_records_of_every_length(ends: Ends) -> None:
    ends.ours.sendall(record(1))
    call = ends.child.next()
    assert call is not None
    for size in [*range(0, 3000, 7), 40_000, 100_000, 131_000]:
        meta = os.urandom(size)
        ends.child.finish(call, 0, meta)
        data = ends.ring.take()
        assert data is not None
        assert data[OUTCOME.size :] == meta


@pytest.mark.parametrize("size", [131_072, 262_144, 3_000_000])
def test_a_record_larger_than_the_ring_is_put_together(ends: Ends, size: int) -> None:
    ends.ours.sendall(record(1))
    call = ends.child.next()
    assert call is not None
    meta = os.urandom(size)
    thread = threading.Thread(target=ends.child.finish, args=(call, 0, meta))
    thread.start()
    data = None
    while data is None:
        data = ends.ring.take()
        thread.join(0.0001)
    thread.join(5)
    assert data[OUTCOME.size :] == meta


def test_the_doorbell_rings_when_the_child_has_nothing_more_to_do(ends: Ends) -> None:
    ends.ours.sendall(record(1))
    call = ends.child.next()
    assert call is not None
    ends.child.finish(call, 0)
    ends.ours.shutdown(socket.SHUT_WR)
    assert ends.child.next() is None
    assert ends.ours.recv(10) == b"!"


def test_published_messages_and_states_ring_at_once(ends: Ends) -> None:
    ends.child.publish(Message("e", "q", TASK.props, TASK.body))
    assert ends.ours.recv(10) == b"!"
    ends.child.state("id-1", "PROGRESS", b"{}")
    first, second = ends.ring.take(), ends.ring.take()
    assert first is not None
    assert first.endswith(b"eq" + TASK.props + TASK.body)
    assert second is not None
    assert second.endswith(b"id-1PROGRESS{}")


@pytest.mark.parametrize("size", [0, 5, 11, 0xFFFFFFFF])
def test_a_damaged_record_size_is_an_error_not_a_crash(ends: Ends, size: int) -> None:
    os.pwrite(ends.shared, struct.pack("=I", size), RING_OFFSET)
    os.pwrite(ends.shared, struct.pack("=Q", 4096), HEAD_OFFSET)
    with pytest.raises(LocalProtocolError):
        ends.ring.take()


def test_a_damaged_head_is_an_error_not_a_crash(ends: Ends) -> None:
    os.pwrite(ends.shared, struct.pack("=Q", 2**60), HEAD_OFFSET)
    with pytest.raises(LocalProtocolError):
        ends.ring.take()


class Struck(Exception):
    """What a handler of a signal raises."""


@contextlib.contextmanager
def struck_after(seconds: float) -> Iterator[None]:
    """Have a signal's handler raise in the ``with`` block."""

    def strike(signum: int, frame: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_all(ring: RingReader) -> list[bytes]:
    return list(iter(ring.take, None))


@pytest.mark.parametrize("size", [101, 60_000])
def test_a_signal_that_raises_while_the_ring_is_full_leaves_no_part_of_a_record(ends: Ends, size: int) -> None:
    sent = []

    def fill() -> None:
        while True:
            ends.child.state("id-1", "PROGRESS", b"x" * size)
            sent.append(size)

    with pytest.raises(Struck), struck_after(0.2):
        fill()
    found = read_all(ends.ring)
    assert [len(each) for each in found] == [len(found[0])] * len(sent)
    ends.child.state("id-1", "PROGRESS", b"the next")
    assert [each[-8:] for each in read_all(ends.ring)] == [b"the next"]


def test_a_signal_that_raises_in_the_midst_of_a_large_record_waits_for_its_end(ends: Ends) -> None:
    body = os.urandom(3_000_000)
    found: list[bytes] = []
    go = threading.Event()

    def read() -> None:
        go.wait(10)
        while len(found) < 2:
            found.extend(read_all(ends.ring))
            time.sleep(0.001)

    thread = threading.Thread(target=read)
    thread.start()
    threading.Timer(0.3, go.set).start()  # the ring is full when the signal comes
    with pytest.raises(Struck), struck_after(0.1):
        ends.child.publish(Message("e", "q", TASK.props, body))
    ends.child.state("id-1", "PROGRESS", b"the next")
    thread.join(10)
    assert [each.endswith(tail) for each, tail in zip(found, (body, b"the next"), strict=True)] == [True, True]


def test_records_of_several_threads_do_not_mix(ends: Ends) -> None:
    bodies = [bytes([number]) * size for number in range(4) for size in (700_000, 10, 100_000)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=ends.child.publish, args=(Message("e", "q", TASK.props, body),)) for body in bodies
    ]
    for thread in threads:
        thread.start()
    while len(found) < len(bodies):
        found.extend(read_all(ends.ring))
        threads[0].join(0.001)
    head = len(found[0]) - len(found[0].partition(b"eq" + TASK.props)[2])
    assert sorted(each[head:] for each in found) == sorted(bodies)
