"""The process that forks children: single-threaded, the application imported, no event loop, no broker socket.

The worker's main process starts it before any loop or thread exists. Requests and reports are datagrams. What is said
of it holds for the starter (``starter.py``) as well, but for the way in which a child comes to be.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final, NoReturn, TypeAlias

from fastq.errors import PoolLost
from fastq.pool import ChildMain, CompanionMain
from fastq.pool.process import DUMP_SIGNAL, LIMIT_SIGNAL, Timer, die_with_parent, set_name
from fastq.wire.pipe import RingReader, shared_size

#: Exit code of a process that came to no other.
EX_INTERNAL: Final = 70
#: The request that a Spawned or a Failed about the companion names.
COMPANION = 0

_SPAWN, _SPAWNED, _EXITED, _FAILED, _BORN, _HANGS = 1, 2, 3, 4, 5, 6
_RECORD = struct.Struct("=BIii")  # kind, request, pid or number, wait status or errno; in a request the group
#: What follows the first record: of _BORN names of threads, of _HANGS the end of a stack, as much as fits.
_NAMES_SIZE: Final = 4096
#: The innermost calls of a hook that hangs.
_STACK_FRAMES: Final = 4
_FDS = struct.Struct("ii")  # what comes with a request for a child: its end of the socket, the shared memory

#: What a child leaves to the main process: a signal that systemd, say, sends to all processes.
LEFT_TO_MAIN: Final = (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2)

#: How long a hook of os.register_at_fork may hold up the zygote. Chosen: hooks take locks, and the zygote has no other
#: thread to hold one.
HOOK_S = 5.0
#: Threads are looked for with the first so many forks, then with every so many-th: to look costs several system calls,
#: and what starts threads at forks does so at once, or when it is first used.
LOOK_FORKS, LOOK_EVERY = 4, 64
#: How long it may take to say where it hangs at its birth.
BIRTH_S = 2.0
#: How long it may take to end. Chosen: it has nothing to do but to leave.
END_S = 2.0


@dataclass(frozen=True, slots=True)
class Order:
    """A child that is wanted: the numbers of its descriptors, its own number, and its group."""

    sock: int
    shared: int
    number: int
    group: int


#: Makes a child: (order, the timer for hooks, what returns the descriptors that are not the child's) -> pid. Raises
#: OSError.
Bear: TypeAlias = Callable[[Order, Timer, Callable[[], Iterable[int]]], int]


@dataclass(frozen=True, slots=True)
class Spawned:
    """A child was forked."""

    request: int
    pid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A child could not be forked."""

    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A child has ended; ``status`` is what waitpid returned."""

    pid: int
    status: int

    @property
    def reason(self) -> str:
        """How it ended, for people."""
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            try:
                name = signal.Signals(number).name
            except ValueError:
                name = "unknown"
            return f"signal {number} ({name})"
        return f"exitcode {os.waitstatus_to_exitcode(self.status)}"


class Zygote:
    """The main process's handle: ask for children, hear of their end.

    ``fd`` is readable when there is a report, ``pidfd`` when the zygote has ended. Its end cannot be seen from ``fd``
    alone: a child that hangs at its fork has the other side open too. ``threads`` names those that Python code has
    started in it at its birth: hooks of os.register_at_fork.
    """

    def __init__(
        self, pid: int, control: socket.socket, has_companion: bool = False, threads: Sequence[str] = ()
    ) -> None:
        self.pid = pid
        self.threads = threads
        self.pidfd = os.pidfd_open(pid)
        self.has_companion = has_companion
        self._control = control
        self._status: int | None = None

    @property
    def fd(self) -> int:
        """Return the descriptor to watch for reports."""
        return self._control.fileno()

    def spawn(self, request: int, number: int, group: int = 0, slots: int = 1) -> tuple[socket.socket, RingReader]:
        """Ask for a child and return our ends of its socket and ring; a Spawned or a Failed with this request follows.

        ``group`` says of which children it is one, ``slots`` how many calls those run at a time. Raises OSError: no
        descriptors, no memory, or a few hundred requests that wait already.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs, open(os.memfd_create("fastq-child", os.MFD_CLOEXEC), "wb") as shared:
                os.ftruncate(shared.fileno(), shared_size(slots))
                reader = RingReader(shared.fileno(), slots)
                record = _RECORD.pack(_SPAWN, request, number, group)
                socket.send_fds(self._control, [record], [theirs.fileno(), shared.fileno()])
        except BaseException:
            ours.close()
            raise
        return ours, reader

    def spawn_companion(self) -> None:
        """Ask for the companion; a Spawned or a Failed with the request COMPANION follows.

        Raises BlockingIOError when a few hundred requests wait already.
        """
        self._control.send(_RECORD.pack(_SPAWN, COMPANION, 0, 0))

    def reports(self) -> list[Spawned | Failed | Exited]:
        """Return what has been reported since the last call. Raises EOFError when there will be no more."""
        found: list[Spawned | Failed | Exited] = []
        while True:
            try:
                data = self._control.recv(_RECORD.size)
            except BlockingIOError:
                return found
            except ConnectionResetError:  # it left requests unread
                data = b""
            if not data:
                raise EOFError("no more reports")
            kind, request, pid, status = _RECORD.unpack(data)
            if kind == _SPAWNED:
                found.append(Spawned(request, pid))
            elif kind == _FAILED:
                found.append(Failed(request, os.strerror(status)))
            elif kind == _EXITED:
                found.append(Exited(pid, status))

    def reap(self) -> str:
        """Return how it has ended, for people. Call it once ``pidfd`` is readable."""
        if self._status is None:
            try:
                _, self._status = os.waitpid(self.pid, 0)
            except ChildProcessError:  # somebody else has waited for it
                return "unknown"
        return Exited(self.pid, self._status).reason

    def close(self) -> None:
        """Let the zygote end, or kill it when it does not; the kernel kills children that are left."""
        self._control.close()
        if not select.select([self.pidfd], [], [], END_S)[0]:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)  # it hangs in a hook
        self.reap()
        os.close(self.pidfd)


def start_zygote(
    child_main: ChildMain, on_start: Callable[[], None] = lambda: None, companion: CompanionMain | None = None
) -> Zygote:
    """Fork the zygote. Call it before any thread or event loop exists, with the application imported.

    ``on_start`` is called in the zygote before it forks anything.
    """

    def bear(order: Order, alarm: Timer, closes: Callable[[], Iterable[int]]) -> int:
        return fork(lambda: _be_child(child_main, closes(), order), alarm)

    tell_threads()
    gc.collect()
    # Frozen objects are not looked at by the collector, so their pages stay shared with the children.
    gc.freeze()
    try:
        return start_parent(bear, on_start, companion)
    finally:
        gc.unfreeze()


def start_parent(
    bear: Bear,
    on_start: Callable[[], None],
    companion: CompanionMain | None,
    name: bytes = b"fastq-zygote",
    may_have_threads: bool = False,
) -> Zygote:
    """Fork the process whose children ``bear`` makes, and return when it lives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The kernel's signal for a parent's death comes with the end of the thread that forked: another one than the main
    # thread may end long before the process.
    main = os.pidfd_open(os.getpid())
    dies_with_thread = threading.current_thread() is threading.main_thread()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = _fork_watched(theirs)
    if pid == 0:
        code = EX_INTERNAL
        try:
            ours.close()
            if dies_with_thread:
                die_with_parent()
            signal.signal(LIMIT_SIGNAL, signal.SIG_IGN)  # from here on it is not late, whatever the clock says
            _tell_birth(theirs)
            on_start()
            set_name(name)
            code = _serve(theirs, main, bear, companion, may_have_threads)
        finally:
            os._exit(code)
    os.close(main)
    theirs.close()
    threads = _hear_birth(ours, pid)
    ours.setblocking(False)
    return Zygote(pid, ours, companion is not None, threads)


def _fork_watched(control: socket.socket) -> int:
    """Fork; a hook that hangs ends the start, and is named: here by a timer, in the new process by ``_hear_birth``.

    Raises PoolLost for a hook of this process. Another thread than the main one can handle no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return os.fork()
    parent, hung = os.getpid(), list[str]()

    def on_hang(signum: int, frame: FrameType | None) -> None:
        stack = "".join(traceback.format_stack(frame, _STACK_FRAMES))
        if os.getpid() != parent:
            control.send(_RECORD.pack(_HANGS, 0, 0, 0) + stack.encode()[-_NAMES_SIZE:])
            os._exit(EX_INTERNAL)
        hung.append(stack)
        raise HookHangs("a hook of os.register_at_fork hangs; it was ended")

    before = signal.signal(LIMIT_SIGNAL, on_hang)
    alarm = Timer(LIMIT_SIGNAL)
    alarm.set(HOOK_S, HOOK_S)
    pid = 0
    try:
        pid = os.fork()
    finally:
        if os.getpid() == parent:
            alarm.set(0)
            signal.signal(LIMIT_SIGNAL, before)
    if pid and hung:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise _birth_hangs("before or after_in_parent", hung[0])
    return pid


def _birth_hangs(where: str, stack: str) -> PoolLost:
    return PoolLost(
        f"a hook of os.register_at_fork ({where}) did not return within {HOOK_S:g} s when the process that forks "
        f"children was forked. Correct it, or have children spawned (--pool-start-method spawn). Its stack:\n{stack}"
    )


def other_threads() -> dict[int, str]:
    """Return the threads that Python code has started beside this one, by their number to the system."""
    me = threading.current_thread()
    return {thread.native_id or 0: thread.name for thread in threading.enumerate() if thread is not me}


def _tell_birth(control: socket.socket) -> None:
    """Tell that this process lives, and which threads have been started in it already."""
    names = list(other_threads().values())
    control.send(_RECORD.pack(_BORN, 0, len(names), 0) + "\n".join(names).encode()[:_NAMES_SIZE])


def _hear_birth(control: socket.socket, pid: int) -> Sequence[str]:
    """Return the names of the threads in the new process; none when it has ended.

    Raises PoolLost when it hangs: it says where, unless it hangs in C.
    """
    data, is_late = b"", False
    for patience_s, signum in ((HOOK_S, LIMIT_SIGNAL), (BIRTH_S, signal.SIGKILL)):
        control.settimeout(patience_s)
        try:
            data = control.recv(_RECORD.size + _NAMES_SIZE)
            break
        except TimeoutError:
            is_late = True
            os.kill(pid, signum)
    if is_late and data[:1] != bytes([_BORN]):
        os.waitpid(pid, 0)
        raise _birth_hangs("after_in_child", data[_RECORD.size :].decode(errors="replace") or "unknown, as it is in C")
    return data[_RECORD.size :].decode(errors="replace").splitlines()


#: What a child has done with the signals that ``on_signal`` handles: it is told them.
child_handler: Callable[[int, object], None] | None = None


def on_signal(signum: int, frame: object) -> None:
    """Leave a signal to the main process, in the zygote; in a child to its handler, which so costs no system call.

    A handler, not SIG_IGN: programs that tasks start must not inherit that.
    """
    if child_handler is not None:
        child_handler(signum, frame)


class HookHangs(Exception):
    """A hook of os.register_at_fork did not return in time."""


def _end_hook(signum: int, frame: object) -> None:
    """End the hook that runs; Python writes to stderr which one it was, and forks nevertheless."""
    raise HookHangs(
        f"a hook of os.register_at_fork (before or after_in_parent) did not return within {HOOK_S:g} s in the process "
        "that forks children, which has one thread and only the locks that were free at its own fork; it was ended"
    )


def tell_threads() -> bool:
    """Log how many threads this process has beside the one that forks, and which; return whether there are any."""
    count = len(os.listdir("/proc/self/task")) - 1
    if count <= 0:
        return False
    ours = other_threads()
    # Those of libraries in C mostly see to forks themselves.
    logging.getLogger("fastq.worker").log(
        logging.WARNING if ours else logging.INFO,
        "the process has %d more thread%s (%s) while it forks: children do not have them, and a lock that one of them "
        "holds at that moment is never free in a child. Start them in each child, or when they are first used; or have "
        "children spawned (--pool-start-method spawn)",
        count,
        "s"[: count > 1],
        ", ".join(map(repr, ours.values())) or "of libraries in C",
    )
    return True


def handle_signals() -> None:
    """Set the handlers of a process of the pool. Children have them from their first moment on."""
    # A start that hangs can be looked into.
    for signum in (DUMP_SIGNAL, signal.SIGUSR1):
        faulthandler.register(signum, file=sys.__stderr__ or 2, all_threads=True, chain=False)
    for signum in LEFT_TO_MAIN:
        signal.signal(signum, on_signal)
    # Programs that tasks start inherit that: they live through the Ctrl-C of a warm stop, and as a child's group is not
    # the terminal's, they would stand still for ever where they read from or write to it.
    for signum in (signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(signum, signal.SIG_IGN)


def _serve(
    control: socket.socket, main: int, bear: Bear, companion: CompanionMain | None, may_have_threads: bool
) -> int:
    """Make children on request and report ends until the main process goes."""
    _read_nothing()
    handle_signals()
    # All that can be done once is: each page that is written between two forks is copied for the next child.
    signal.signal(LIMIT_SIGNAL, _end_hook)
    alarm = Timer(LIMIT_SIGNAL)
    poll = select.poll()
    poll.register(control.fileno(), select.POLLIN)
    poll.register(main, select.POLLIN)
    forks, is_told = 0, may_have_threads
    pids: dict[int, int] = {}  # pidfd -> pid
    while True:
        for fd, _ in poll.poll():
            if fd in (control.fileno(), main):
                # What is registered for forks may have started threads here: with the first forks, or at times.
                looks = not is_told and (forks < LOOK_FORKS or forks % LOOK_EVERY == 0)
                if looks and fd != main and control.recv(1, socket.MSG_PEEK):  # else there will be no fork any more
                    is_told = tell_threads()
                forks += 1
                if fd == main or not _bear_one(control, main, poll, pids, bear, companion, alarm):
                    for pid in pids.values():
                        _kill_group(pid)
                    return 0
            else:
                poll.unregister(fd)
                os.close(fd)
                pid = pids.pop(fd)
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                if ended is not None and ended.si_code != os.CLD_EXITED:
                    # Killed: it could not end what it had started. Not waited for yet, its number is nobody else's.
                    _kill_group(pid)
                _, status = os.waitpid(pid, 0)
                control.send(_RECORD.pack(_EXITED, 0, pid, status))


def _read_nothing() -> None:
    """Put /dev/null where standard input was: what a task asks of a person is answered at once, with nothing."""
    if sys.stdin is None:
        return  # closed from the start: descriptor 0 may be anything
    null = os.open(os.devnull, os.O_RDONLY)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  for the life of the process


def _kill_group(pid: int) -> None:
    """Kill what a child has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _bear_one(
    control: socket.socket,
    main: int,
    poll: select.poll,
    pids: dict[int, int],
    bear: Bear,
    companion: CompanionMain | None,
    alarm: Timer,
) -> bool:
    """Carry out one request; False when the main process has gone."""
    # Close-on-exec: programs that tasks start get neither, however they are started. (``recv_fds`` takes no flags.)
    data, ancillary, _, _ = control.recvmsg(_RECORD.size, socket.CMSG_LEN(_FDS.size), socket.MSG_CMSG_CLOEXEC)
    if not data:
        return False
    _, request, number, group = _RECORD.unpack(data)
    sock, shared = (
        _FDS.unpack(ancillary[0][2]) if ancillary else os.pipe()
    )  # the companion begins with what comes out of the pipe

    def closes() -> Iterable[int]:
        return control.detach(), main, *pids

    failure = pid = 0
    try:
        if request == COMPANION:
            pid = _fork_companion(companion, closes, sock, shared, alarm)
        else:
            pid = bear(Order(sock, shared, number, group), alarm, closes)
    except OSError as error:
        failure = error.errno or errno.EAGAIN
    if failure:
        os.close(sock)
        os.close(shared)
        control.send(_RECORD.pack(_FAILED, request, 0, failure))
        return True
    if request == COMPANION:
        os.write(shared, b"!")
    os.close(sock)
    os.close(shared)
    fd = os.pidfd_open(pid)
    pids[fd] = pid
    poll.register(fd, select.POLLIN)
    control.send(_RECORD.pack(_SPAWNED, request, pid, 0))
    return True


def fork(work: Callable[[], int], alarm: Timer) -> int:
    """Fork a process that ends with the code that ``work`` returns; return its pid.

    Raises OSError: no memory, no processes left, or ETIMEDOUT where a hook hangs.
    """
    alarm.set(HOOK_S, HOOK_S)
    try:
        pid = os.fork()
        if pid:
            alarm.set(0)
    except OSError:
        alarm.set(0)
        raise
    except HookHangs as hangs:  # between two hooks: nobody knows whether the fork was done; a child has no sockets then
        alarm.set(0)
        raise OSError(errno.ETIMEDOUT, str(hangs)) from None
    if pid == 0:
        end_with(work)
    return pid


def _be_child(child_main: ChildMain, closes: Iterable[int], order: Order) -> int:
    """Run calls; returns the exit code."""
    die_with_parent()
    os.setpgid(0, 0)  # a group, not a session: a leader of one could not call setpgrp itself
    for fd in closes:
        os.close(fd)
    return child_main(order.sock, order.shared, order.number, order.group)


def _fork_companion(
    companion: CompanionMain | None, closes: Callable[[], Iterable[int]], sock: int, shared: int, alarm: Timer
) -> int:
    zygote = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return fork(lambda: _be_companion(companion, closes(), zygote, sock, shared), alarm)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _be_companion(companion: CompanionMain | None, closes: Iterable[int], zygote: int, sock: int, shared: int) -> int:
    """Run the companion once the zygote has told of it; returns the exit code. No group: nobody kills it with one."""
    die_with_parent(signal.SIGTERM)
    for fd in (*closes, shared):
        os.close(fd)
    is_told = bool(os.read(sock, 1)) and os.getppid() == zygote
    return companion() if is_told and companion is not None else EX_INTERNAL


def end_with(work: Callable[[], int]) -> NoReturn:
    """End the process with the exit code that the work returns; one that fails is an internal error."""
    code = EX_INTERNAL
    try:
        code = work()
    except KeyboardInterrupt:
        code = 130
    except Exception:
        logging.getLogger("fastq.worker").critical("a child ends because of an internal error", exc_info=True)
    finally:
        # No finalizers: what the parent process had open is not this process's to clean up.
        os._exit(code)
