"""Private servers for tests and benchmarks: RabbitMQ, Redis, PostgreSQL, in folders and on ports of their own.

Each is a child process and is stopped by its own pid; a server that runs on the machine already is never touched.
Source: rabbitmq-server(8) and rabbitmq-env.conf(5) for the variables, AMQP 0-9-1 section 2.2.4 for the readiness check.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
START_TIMEOUT_S = 90.0  # measured 5 s on an idle machine, 13 s on a loaded one
STOP_TIMEOUT_S = 30.0
#: Beyond this RabbitMQ takes nothing more from producers; replies that nobody reads can take more than 512 MB.
RABBITMQ_MEMORY = "4GB"


class ServerMissing(Exception):
    """The server's program is not installed; the text names the package."""


class ServerFailed(Exception):
    """The server did not start, answer or stop in time; the text ends with its log."""


class RabbitMQ:
    """One RabbitMQ node. It can be restarted on the same data and ports, killed, and paused."""

    def __init__(self, folder: Path, settings: dict[str, str] | None = None) -> None:
        if not RABBITMQ_SERVER.exists() or not shutil.which("epmd"):
            raise ServerMissing("RabbitMQ is not installed: apt-get install rabbitmq-server")
        self.folder = folder
        self.settings = settings or {}
        self.port = 0
        self.restarts = 0
        self._log_file = folder / "rabbitmq.log"
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._control: _Control | None = None
        self._vhosts_made = 0

    # -- life

    def start(self) -> RabbitMQ:
        """Return self when the node answers; try other ports when another process took ours meanwhile."""
        for attempt in range(3):
            self.port = free_ports(3)
            self._write_configuration()
            try:
                self._start_epmd()
                self._start_node()
                break
            except ServerFailed as error:
                self.close()
                port_taken = "already_used" in str(error) or "eaddrinuse" in str(error)
                if attempt == 2 or not port_taken:
                    raise
        assert self._epmd is not None
        self._control = _Control(self._environment(), self._node_name, self.folder, self._epmd.pid)
        return self

    def stop(self) -> None:
        """Stop the node in order; its data and ports stay for start_again()."""
        if self._node is None:
            return
        self.resume()
        self._node.send_signal(signal.SIGTERM)
        try:
            self._node.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill9()
        self._node = None

    def start_again(self) -> None:
        """Start the stopped node on the same data and ports."""
        self.restarts += 1
        self._start_node()

    def restart(self) -> None:
        """Stop in order and start again, as an operator would."""
        self.stop()
        self.start_again()

    def kill9(self) -> None:
        """Kill the node as a crash would; start_again() brings it back."""
        if self._node is None:
            return
        # The script has started the Erlang machine as its child; a SIGKILL to the script alone would leave it running.
        for process in self._erlang_machines():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._node.wait(STOP_TIMEOUT_S)
        self._node = None

    def pause(self) -> None:
        """Stop the node's process without closing its connections: a machine that hangs."""
        for process in self._erlang_machines():
            process.suspend()

    def resume(self) -> None:
        """Let a paused node run again."""
        for process in self._erlang_machines():
            process.resume()

    def close(self) -> None:
        """Stop everything this object started."""
        self.stop()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(STOP_TIMEOUT_S)
            self._epmd = None

    # -- use

    def url(self, vhost: str = "/") -> str:
        """Return the AMQP URL of a virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{vhost if vhost != '/' else '%2F'}"

    def new_vhost(self) -> str:
        """Make a virtual host that nobody has used and return its name."""
        self._vhosts_made += 1
        name = f"v{self._vhosts_made}"
        self.evaluate(
            f'begin rabbit_vhost:add(<<"{name}">>, <<"test">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"guest">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"test">>) end'
        )
        return name

    def delete_vhost(self, vhost: str) -> None:
        """Drop a virtual host with all its queues and connections."""
        self.evaluate(f'rabbit_vhost:delete(<<"{vhost}">>, <<"test">>)')

    def evaluate(self, expression: str) -> str:
        """Run an Erlang expression on the node and return its printed value: what `rabbitmqctl eval` does, in 1 ms."""
        assert self._control is not None, "start() first"
        return self._control.evaluate(expression)

    def queue_depth(self, vhost: str, queue: str) -> int:
        """Return how many messages the queue holds, ready and unacknowledged; -1 when there is no such queue."""
        value = self.evaluate(
            f'case rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)) of '
            "{ok, Q} -> proplists:get_value(messages, rabbit_amqqueue:info(Q, [messages])); _ -> -1 end"
        )
        return int(value)

    def ready_messages(self, vhost: str, queue: str) -> int:
        """Return how many messages of the queue nobody has in hand."""
        value = self.evaluate(
            f'case rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)) of '
            "{ok, Q} -> proplists:get_value(messages_ready, rabbit_amqqueue:info(Q, [messages_ready])); _ -> -1 end"
        )
        return int(value)

    def close_connections(self, reason: str = "closed by the test") -> None:
        """Close every client connection from the server's side, as an operator can."""
        # One that ends by itself meanwhile is no error.
        close = f'(catch rabbit_networking:close_connection(P, "{reason}"))'
        self.evaluate(f"[{close} || P <- rabbit_networking:connections()]")

    def block_publishers(self) -> None:
        """Raise the memory alarm: the node sends connection.blocked and stops reading from producers."""
        self.evaluate("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1})")

    def unblock_publishers(self) -> None:
        """Clear the memory alarm."""
        self.evaluate(f'vm_memory_monitor:set_vm_memory_high_watermark({{absolute, "{RABBITMQ_MEMORY}"}})')

    def pids(self) -> list[int]:
        """Return the pids of the Erlang machine and its helpers, for measuring."""
        return [process.pid for process in self._erlang_machines()]

    def log(self) -> str:
        """Return what the node has logged so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace") if self._log_file.exists() else ""

    # -- inside

    @property
    def _node_name(self) -> str:
        return f"t{self.port}@localhost"

    def _write_configuration(self) -> None:
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "distribution.listener.interface": "127.0.0.1",
            "log.console": "true",
            "log.file": "false",
            "vm_memory_high_watermark.absolute": RABBITMQ_MEMORY,
            "disk_free_limit.absolute": "50MB",
            **self.settings,
        }
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (self.folder / "rabbitmq.conf").write_text(lines, encoding="utf-8")
        (self.folder / "enabled_plugins").write_text("[].\n", encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": folder,  # the Erlang cookie is written there
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": self._node_name,
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{folder}/gen",
            "RABBITMQ_SCHEMA_DIR": f"{folder}/schema",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self.port + 2),
            "ERL_EPMD_PORT": str(self.port + 1),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none",
        }

    def _start_epmd(self) -> None:
        # Without one of our own the node would start a detached epmd, which outlives the session.
        self._epmd = subprocess.Popen(
            ["epmd", "-port", str(self.port + 1), "-address", "127.0.0.1"],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: _accepts(self.port + 1), START_TIMEOUT_S, self._failed("epmd did not start"))

    def _start_node(self) -> None:
        with self._log_file.open("ab") as log:
            self._node = subprocess.Popen(
                # Not the one on PATH: Debian's wrapper turns root into user rabbitmq and refuses everybody else.
                [str(RABBITMQ_SERVER)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # a Ctrl-C in the terminal is for the tests, not for the broker
            )
        node = self._node
        wait_until(
            lambda: amqp_answers(self.port) or node.poll() is not None,
            START_TIMEOUT_S,
            self._failed("RabbitMQ did not answer in time"),
        )
        if node.poll() is not None:
            self._node = None
            raise self._failed(f"RabbitMQ ended with exit code {node.returncode}")()

    def _erlang_machines(self) -> list[psutil.Process]:
        if self._node is None:
            return []
        try:
            machines: list[psutil.Process] = psutil.Process(self._node.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return machines

    def _failed(self, what: str) -> Callable[[], ServerFailed]:
        return lambda: ServerFailed(f"{what}\n{self.log()[-4000:]}")


class _Control:
    """A second, hidden Erlang node that evaluates one expression per line on the broker.

    `rabbitmqctl` starts a whole Erlang machine for each command (1.5 s); this one stays. It also watches over the
    broker: when its input ends because the test process died, it halts the node and ends epmd.
    """

    PROGRAM = """
        Node = '%(node)s',
        Run = fun(Line) ->
            try
                {ok, Tokens, _} = erl_scan:string(Line),
                {ok, Expressions} = erl_parse:parse_exprs(Tokens),
                case rpc:call(Node, erl_eval, exprs, [Expressions, []], 60000) of
                    {value, Value, _} -> {ok, Value};
                    Other -> {error, Other}
                end
            catch Class:Reason -> {error, {Class, Reason}} end
        end,
        Loop = fun(Self) ->
            case io:get_line("") of
                Line when is_list(Line) ->
                    {Mark, Result} = Run(Line),
                    io:format("~s ~0p~n", [Mark, Result]),
                    Self(Self);
                _ ->
                    rpc:call(Node, erlang, halt, [0], 1000),
                    os:cmd("kill %(epmd)d"),
                    halt(0)
            end
        end,
        Loop(Loop).
    """

    def __init__(self, environment: dict[str, str], node: str, folder: Path, epmd_pid: int) -> None:
        cookie = (folder / ".erlang.cookie").read_text(encoding="ascii")
        name = f"ctl{secrets.token_hex(4)}@localhost"
        program = self.PROGRAM % {"node": node, "epmd": epmd_pid}
        command = ["erl", "-noshell", "-hidden", "-sname", name, "-setcookie", cookie, "-start_epmd", "false"]
        command += ["+S", "1:1", "+sbwt", "none", "-kernel", "inet_dist_use_interface", "{127,0,0,1}"]
        self._process = subprocess.Popen(
            [*command, "-eval", " ".join(program.split())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            text=True,
            start_new_session=True,
        )

    def evaluate(self, expression: str) -> str:
        """Return the printed value of the expression; raises ServerFailed with Erlang's reason."""
        requests, answers = self._streams()
        requests.write(" ".join(expression.split()) + ".\n")
        requests.flush()
        mark, _, value = answers.readline().rstrip("\n").partition(" ")
        if mark != "ok":
            raise ServerFailed(f"{expression}: {value or 'the control node ended'}")
        return value

    def close(self) -> None:
        """End the control node."""
        requests, answers = self._streams()
        requests.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        answers.close()

    def _streams(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


class Redis:
    """One Redis server, without persistence unless ``settings``, lines of redis.conf, have it."""

    def __init__(self, folder: Path, settings: dict[str, str] | None = None) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise ServerMissing("Redis is not installed: apt-get install redis-server")
        self.folder = folder
        self.settings = settings or {}
        self.port = 0
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Redis:
        """Return self when the server answers PING."""
        self.port = self.port or free_ports(1)
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
        for name, value in self.settings.items():
            command += [f"--{name}", *value.split(" ")]
        self._run(command)
        return self

    def url(self, database: int = 0) -> str:
        """Return the URL of one numbered database."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def stop(self) -> None:
        """Stop the server in order."""
        self._end(signal.SIGTERM)

    def kill9(self) -> None:
        """Kill the server as a crash would; start() brings an empty one back on the same port."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start on the same port. Data is gone, unless the settings have it persisted."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stop the process without closing its connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server run again."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def pids(self) -> list[int]:
        """Return the server's pid, for measuring."""
        return [self._process.pid] if self._process is not None else []

    close = stop

    def log(self) -> str:
        """Return what the server has logged so far."""
        return (self.folder / "redis.log").read_text(encoding="utf-8", errors="replace")

    def _run(self, command: list[str]) -> None:
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},  # no LD_PRELOAD of a sanitizer
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, START_TIMEOUT_S, lambda: ServerFailed(f"Redis did not answer\n{self.log()}"))

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _end(self, signal_number: signal.Signals) -> None:
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(signal_number)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._process = None


class RedisSentinel(Redis):
    """One Sentinel that watches a master and needs nobody's consent to make a replica the master."""

    def __init__(self, folder: Path, master_port: int, service: str = "mymaster") -> None:
        super().__init__(folder)
        self.service = service
        self._master_port = master_port

    def start(self) -> RedisSentinel:
        """Return self when the Sentinel answers PING."""
        self.port = self.port or free_ports(1)
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.folder}",
            f"sentinel monitor {self.service} 127.0.0.1 {self._master_port} 1",
            f"sentinel down-after-milliseconds {self.service} 500",
            f"sentinel failover-timeout {self.service} 3000",
        ]
        file = self.folder / "sentinel.conf"  # Sentinels write what they learn into it
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._run([self._program, str(file), "--sentinel"])
        return self

    def url(self, database: int = 0) -> str:
        """Return the URL by which clients find the master."""
        return f"sentinel://127.0.0.1:{self.port}/{database}"


class PostgreSQL:
    """One PostgreSQL server with a database of its own, which lets everybody in."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        found = shutil.which("postgres", path=os.pathsep.join([*map(str, programs[-1:]), os.environ.get("PATH", "")]))
        if found is None:
            raise ServerMissing("PostgreSQL is not installed: apt-get install postgresql")
        self.port = 0
        self._program = Path(found).resolve()
        # It refuses to be root; the Debian package makes this user.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> PostgreSQL:
        """Return self when the server takes connections."""
        self.port = free_ports(1)
        # Not in pytest's folder: nobody but root may look into that.
        self._folder = tempfile.TemporaryDirectory(prefix="fastq-postgresql-")
        folder = Path(self._folder.name)
        if self._user:
            shutil.chown(folder, self._user)
        data = folder / "data"
        make = ["-D", str(data), "-U", "postgres", "-A", "trust", "-N", "--no-instructions"]
        log = folder / "postgresql.log"
        with log.open("ab") as output:
            alike: dict[str, Any] = {
                "user": self._user, "cwd": folder, "stdin": subprocess.DEVNULL, "stdout": output, "stderr": output
            }  # fmt: skip
            done = subprocess.run([self._program.with_name("initdb"), *make], check=False, **alike)
            if done.returncode:
                raise ServerFailed(f"initdb ended with exit code {done.returncode}\n{log.read_text()}")
            self._process = subprocess.Popen(
                [self._program, "-D", data, "-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-F"],
                start_new_session=True,
                **alike,
            )
        wait_until(
            lambda: "ready to accept connections" in log.read_text(),
            START_TIMEOUT_S,
            lambda: ServerFailed(f"PostgreSQL did not start\n{log.read_text()}"),
        )
        return self

    def close(self) -> None:
        """Stop the server, whoever is connected."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._process = None
        self._folder.cleanup()


def free_ports(count: int) -> int:
    """Return the first of `count` neighbouring free ports on loopback, all below the ephemeral range.

    A port of the ephemeral range (32768 to 60999) can be taken at any moment as the local end of some other connection.
    """
    generator = random.SystemRandom()
    for _ in range(200):
        first = generator.randrange(15_000, 32_000, 4)
        if all(_is_free(first + offset) for offset in range(count)):
            return first
    raise ServerFailed(f"no {count} neighbouring ports are free between 15000 and 32000")


def wait_until(ready: Callable[[], bool], timeout_s: float, failed: Callable[[], Exception]) -> None:
    """Return when `ready()` is true; raise what `failed()` makes when that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.01
    while not ready():
        if time.monotonic() > deadline:
            raise failed()
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.2)


def amqp_answers(port: int) -> bool:
    """Return whether a broker lets guest in and opens the default virtual host."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            _expect_method(connection, 10, 10)
            # connection.start-ok: no client properties, PLAIN, \0user\0password, locale
            connection.sendall(_method(10, 11, b"\0\0\0\0\x05PLAIN" + b"\0\0\0\x0c\0guest\0guest" + b"\x05en_US"))
            _expect_method(connection, 10, 30)
            # connection.tune-ok: 16 channels, 128 KiB frames, no heartbeat; then connection.open on "/"
            connection.sendall(_method(10, 31, struct.pack(">HIH", 16, 131072, 0)) + _method(10, 40, b"\x01/\0\0"))
            _expect_method(connection, 10, 41)
            connection.sendall(_method(10, 50, b"\0\xc8\0\0\0\0\0"))
            _expect_method(connection, 10, 51)
            return True
    except OSError:
        return False


def _method(class_id: int, method_id: int, arguments: bytes) -> bytes:
    payload = struct.pack(">HH", class_id, method_id) + arguments
    return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"


def _expect_method(connection: socket.socket, class_id: int, method_id: int) -> None:
    header = _receive(connection, 7)
    (size,) = struct.unpack(">I", header[3:7])
    payload = _receive(connection, size + 1)
    if payload[:4] != struct.pack(">HH", class_id, method_id):
        raise ConnectionError(f"expected method {class_id}.{method_id}, got {payload[:4]!r}")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionError("the broker closed the connection")
        data += chunk
    return data


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def main() -> None:
    """Run a RabbitMQ and a Redis until interrupted, and print their URLs."""
    with tempfile.TemporaryDirectory(prefix="fastq-services-") as name, contextlib.ExitStack() as stack:
        folders = [Path(name, "rabbitmq"), Path(name, "redis")]
        for folder in folders:
            folder.mkdir()
        rabbitmq = RabbitMQ(folders[0]).start()
        stack.callback(rabbitmq.close)
        redis = Redis(folders[1]).start()
        stack.callback(redis.close)
        print(f"{rabbitmq.url()}\n{redis.url()}\nCtrl-C ends both.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
