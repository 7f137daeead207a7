"""``fastq worker``: reads the options, prepares the process, runs the worker. What a worker does is in fastq.worker.

Order: leaving the first process of a container, working directory, umask, detach, user and group, application, pid
and log file, logging, banner, worker. User code is imported and files are opened only after root was given up, and
after all forking into the background.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from fastq.brokers import has_bus, try_broker, unknown_options
from fastq.cli import Globals
from fastq.cli.errors import Misuse, one_line, run_guarded
from fastq.cli.options import misplaced_globals, name_list, plural
from fastq.cli.unread import declared_queues, unread_queues
from fastq.errors import FastqError, SettingsError
from fastq.net.urls import mask_url, scheme_of
from fastq.pool import find_pool
from fastq.pool.patched import patched_by
from fastq.queues import Topology
from fastq.version import __version__
from fastq.worker.banner import Banner
from fastq.worker.options import NODE_NAME, WorkerOptions, available_cpus, expand_path
from fastq.worker.process.daemon import (
    Daemon,
    change_directory,
    detach_process,
    drop_privileges,
    go_on_with,
    is_detached,
    set_umask,
    taken_over,
    warn_root,
)
from fastq.worker.process.init import leave_init
from fastq.worker.process.log import LEVELS, SHOW_INFO, open_handler
from fastq.worker.process.pidfile import Pidfile

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.worker.program import Program

logger = logging.getLogger("fastq.worker")

_POOLS = "What runs the tasks: prefork (default), threads, asyncio, gevent, eventlet, solo, or module:NAME."


def _concurrency(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return the number of children; ``auto`` counts the processors that this process may use."""
    if value is None:
        return None
    if value == "auto":
        return available_cpus()
    if not value.isdigit():
        raise click.BadParameter(f"{value!r} is not a whole number, nor 'auto'", ctx, param)
    return int(value)


def _autoscale(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return most and least children: two numbers in either order, or the most alone."""
    if value is None:
        return None
    numbers = value.split(",")
    if len(numbers) > 2 or not all(number.strip().isdigit() for number in numbers):
        raise click.BadParameter(f"{value!r} is not MAX,MIN, such as 10,3", ctx, param)
    most, least = sorted((int(numbers[0]), int(numbers[-1]) if len(numbers) == 2 else 0), reverse=True)
    return most, least


#: The help's sections, by an option's parameter; what stands in none of them is general.
_SECTIONS = {
    "Messages": ("queues", "exclude_queues", "prefetch_multiplier", "disable_prefetch", "purge", "reliable"),
    "Child processes": (
        *("concurrency", "pool", "processes", "async_processes", "async_slots", "autoscale"),
        *("pool_start_method", "max_tasks_per_child", "max_memory_per_child"),
    ),
    "Time": ("time_limit", "soft_time_limit", "grace"),
    "Monitoring": ("task_events", "statedb", "without_mingle", "without_heartbeat", "heartbeat_interval"),
    "Process": ("logfile", "pidfile", "detach", "executable", "workdir", "uid", "gid", "umask"),
}


class WorkerCommand(click.Command):
    """The command, with its options' help in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, the general ones first."""
        rows: dict[str, list[tuple[str, str]]] = {"Options": [], **{title: [] for title in _SECTIONS}}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                section = next((title for title, names in _SECTIONS.items() if param.name in names), "Options")
                rows[section].append(record)
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


# What the application adds is not known before it is imported: words that look like options are kept until then.
@click.command("worker", cls=WorkerCommand, context_settings={"ignore_unknown_options": True})
@click.option("-n", "--hostname", default="", metavar="NAME", help="Node name; expands %h %n %d. Default fastq@%h.")
@click.option("-c", "--concurrency", metavar="N", callback=_concurrency, help="Child processes; 'auto': by CPU quota.")
@click.option("-Q", "--queues", type=name_list, default="", metavar="A,B", help="Queues to consume.")
@click.option("-X", "--exclude-queues", type=name_list, default="", metavar="A,B", help="Queues to leave out.")
@click.option("-I", "--include", type=name_list, default="", metavar="A,B", help="More modules to import.")
@click.option("-l", "--loglevel", type=click.Choice(LEVELS, case_sensitive=False), default="WARNING", show_default=True)
@click.option("-f", "--logfile", default="", help="Log file; expands %n %h %d %p %i %I. Default: standard error.")
@click.option("--pidfile", default="", help="Pid file; expands the same. Empty: none.")
@click.option("--prefetch-multiplier", type=int, help="Messages held per child; 0: 4,096 in all.")
@click.option("--time-limit", type=float, help="Seconds after which the child that runs a task is killed.")
@click.option("--soft-time-limit", type=float, help="Seconds after which SoftTimeLimitExceeded is raised in the task.")
@click.option("--max-tasks-per-child", type=int, help="Replace a child after this many tasks.")
@click.option("--max-memory-per-child", type=int, help="Replace a child that uses more KiB than this.")
@click.option("--reliable/--compat", default=None, help="Acknowledge after the task has run, or before as Celery does.")
@click.option("--grace", type=float, help="Seconds that running tasks have to end after a warm stop was asked for.")
@click.option("--purge", "--discard", is_flag=True, help="Delete what waits in the queues before starting.")
@click.option("-O", "--optimization", type=click.Choice(["default", "fair"]), default="default", hidden=True)
@click.option("-P", "--pool", default="", help=_POOLS)
@click.option("-E", "--task-events", "--events", is_flag=True, default=None, help="Send task events, for monitors.")
@click.option("--processes", type=click.IntRange(1), metavar="N", help="Processes of threads or coroutines.")
@click.option("--async-processes", type=click.IntRange(0), metavar="N", help="Children for async tasks. Default: 1.")
@click.option("--async-slots", type=click.IntRange(1), metavar="N", help="Tasks at a time in each. Default: 1000.")
@click.option("--autoscale", callback=_autoscale, metavar="MAX,MIN", help="Grow and shrink the pool with the work.")
@click.option("-S", "--statedb", default="", help="File that keeps what was revoked; expands as --logfile.")
@click.option("--without-gossip", is_flag=True, hidden=True)
@click.option("--without-mingle", is_flag=True, help="Do not ask other workers at start what was revoked.")
@click.option("--without-heartbeat", is_flag=True, help="Do not tell monitors that the worker lives.")
@click.option("--heartbeat-interval", type=float, help="Seconds between two such events.")
@click.option("-D", "--detach", is_flag=True, help="Go on in the background.")
@click.option("--workdir", default="", help="Change to this directory first.")
@click.option("--uid", default="", help="Become this user first; files are opened as that user.")
@click.option("--gid", default="", help="Become this group first.")
@click.option("--umask", default="", metavar="OCTAL", help="File mode mask.")
@click.option("-B", "--beat", is_flag=True, help="Celery: send periodic tasks too, from a process beside the worker.")
@click.option("-s", "--schedule-filename", "--schedule", default="", help="Celery: file of the schedule.")
@click.option("--scheduler", default="", help="Celery: class of the scheduler.")
@click.option("--disable-prefetch", is_flag=True, default=None, help="Redis: take a message when a child is free.")
@click.option(
    "--pool-start-method",
    type=click.Choice(["fork", "forkserver", "spawn"]),
    help="How children start. Default: forked, but spawned where the application's import starts threads.",
)
@click.option("--executable", help="With --detach: the Python that runs the worker.")
@click.argument("overrides", nargs=-1, metavar="[-- SETTING=VALUE ...]")
@misplaced_globals
@click.pass_obj
def command(
    settings: Globals,
    /,
    overrides: tuple[str, ...],
    workdir: str,
    uid: str,
    gid: str,
    umask: str,
    detach: bool,
    executable: str | None,
    grace: float | None,
    **options: Any,
) -> int:
    """Run tasks until told to stop.

    TERM or INT stops warm: running tasks end first. A second one, or QUIT, stops at once. HUP restarts.
    """
    if settings.application is None:  # else it is a program that has started the worker, and its process
        leave_init()
    settings.require_app()
    if workdir:
        change_directory(workdir)
    if umask:
        set_umask(umask)
    asked = WorkerOptions(**options, grace_s=grace, color=settings.color, quiet=settings.quiet)
    start = Start(settings, asked, uid, gid, overrides, umask, executable or "")
    if not detach:
        return start.run()
    if not is_detached():
        if executable:
            go_on_with(executable)
        start.daemon = detach_process()
    elif (daemon := taken_over()) is not None:
        start.daemon = daemon
    else:  # it was restarted
        return start.run()
    # An error is reported while the terminal is still ours; its code becomes that of the command that was typed.
    code = run_guarded(start.run)
    start.daemon.finished(code)
    return code


@dataclass(slots=True)
class Start:
    """One start of a worker in this process."""

    settings: Globals
    options: WorkerOptions
    uid: str = ""
    gid: str = ""
    overrides: tuple[str, ...] = ()
    umask: str = ""
    executable: str = ""
    daemon: Daemon | None = None
    _imported: list[threading.Thread] | None = None  # threads that the application's import has started

    def run(self) -> int:
        """Drop privileges, load the application, open the files, and run the worker until it ends."""
        drop_privileges(self.uid, self.gid)
        program = self._load_program()
        if self.options.pool:
            find_pool(self.options.pool)  # in the application's folder; before any file is made
        self._follow_settings(program)
        with Pidfile(expand_path(self.options.pidfile, self.options.hostname)):
            handler = open_handler(self.options.logfile, self.options.hostname)
            program.begin(self.options.resolved(program.settings))
            full = self.options.resolved(program.settings)
            program.setup_logging(handler, full)
            warn_root(program.settings.accept_content)
            warn_prefetch(program.settings)
            warn_options(program.settings)
            refuse_patched()
            full = program.prepare(full)
            if not self.options.quiet:
                show_banner(program, full)
            if full.purge:
                purge(program, full.queues)
            self._warn_unread(program, full)
            if self.daemon is not None:
                self.daemon.started()
            return self._work(program, full)

    def _follow_settings(self, program: Program) -> None:
        """Do what the command line has left to the settings; what they say is known only once they are imported."""
        said = program.process_settings
        self.options = program.complete(self.options)
        if self.daemon is not None and said["executable"] and not self.executable:
            go_on_with(said["executable"], self.daemon)
        if said["umask"] and not self.umask:
            set_umask(said["umask"])
        if not self.uid and not self.gid:
            drop_privileges(said["uid"], said["gid"])

    def _work(self, program: Program, options: WorkerOptions) -> int:
        # Imported only now: it brings the event loop, which a start that fails has no use for.
        from fastq.worker.worker import Worker

        try:
            # Elsewhere a program has started the worker, in a thread of its own, and signals are that program's.
            is_main = threading.current_thread() is threading.main_thread()
            return Worker(program, options, self._imported).run(handle_signals=is_main)
        except FastqError as error:
            if options.logfile:
                # Standard error, where it is said as well, may be nowhere by now.
                logger.critical("%s", one_line(str(error)))
            raise

    def _warn_unread(self, program: Program, options: WorkerOptions) -> None:
        """Name the queues that tasks go to and that neither this worker nor another one is meant to read."""
        from fastq.worker.program import FastQProgram

        settings = program.settings
        told = bool(self.options.queues or self.options.exclude_queues)
        if not isinstance(program, FastQProgram) or (told and settings.task_queues is None):
            return
        for queue, text in unread_queues(program.app, declared_queues(settings) | {*options.queues}):
            logger.warning("queue %r is not read: %s", queue, text)

    def _load_program(self) -> Program:
        from fastq.cli.loader import import_module, load_tasks

        program = self.settings.load_program()
        if program.node == NODE_NAME:
            _refuse_beat(self.options)
        try:
            self.options, overrides = program.adopt(self.options, self.overrides)
        except click.NoSuchOption as error:
            raise _no_such_option(error.option_name, error.ctx) from None
        except click.UsageError as error:  # of an option that the application has added
            error.ctx = click.get_current_context()
            raise
        unknown = next((word for word in overrides if word.startswith("-")), None)
        if unknown is not None:
            raise _no_such_option(unknown)
        for name in self.options.include:
            import_module(name, f"-I {name}")
        load_tasks(lambda: program.load(self.options, overrides), program.app)
        if self.settings.application is None:  # else it is a program's own business how its children start
            self._imported = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
        return program


def _no_such_option(word: str, own: click.Context | None = None) -> click.NoSuchOption:
    """Return the error for an option that there is not, with those that are meant; ``own``: the application's too."""
    import difflib  # only needed on the way to an error

    ctx = click.get_current_context()
    params = [*ctx.command.params, *(own.command.params if own is not None else ())]
    known = [name for param in params if isinstance(param, click.Option) for name in param.opts + param.secondary_opts]
    name = word.partition("=")[0]
    return click.NoSuchOption(name, possibilities=difflib.get_close_matches(name, known), ctx=ctx)


def _refuse_beat(options: WorkerOptions) -> None:
    given = (("-B", options.beat), ("-s", options.schedule_filename), ("--scheduler", options.scheduler))
    for name, value in given:
        if value:
            raise Misuse(
                f"option {name} is not carried by this version of fastq; remove it: "
                "FastQ applications have no periodic tasks yet"
            )


def show_banner(program: Program, options: WorkerOptions) -> None:
    """Print the banner, and the tasks at log level INFO and below."""
    most, least = options.autoscale or (0, 0)
    banner = Banner(
        hostname=options.hostname,
        version=__version__,
        app=program.title,
        transport=mask_url(str(program.settings.broker_url)),
        results=program.shown_results,
        concurrency=f"{{min={least}, max={most}}}" if options.autoscale else options.concurrency or 1,
        queues=map(Topology(program.settings).spec, sorted(options.queues)),
        tasks=[name for name in program.names if options.loglevel == "DEBUG" or not name.startswith("celery.")],
        mode="reliable" if options.reliable else "compat",
        pool=options.pool,
        events=bool(options.task_events) if has_bus(str(program.settings.broker_url)) else None,
    )
    click.echo(banner.text())
    if options.loglevel in SHOW_INFO:
        click.echo(banner.task_list())


def warn_prefetch(settings: Settings) -> None:
    """Log a warning when messages are not to be fetched in advance, and the broker cannot do without."""
    broker = try_broker(settings.broker_url)
    if settings.worker_disable_prefetch and not (broker is not None and broker.may_not_prefetch):
        logger.warning(
            "worker_disable_prefetch is only supported for Redis brokers. Current broker transport: %s. "
            "Ignoring disable_prefetch setting.",
            scheme_of(settings.broker_url),
        )


def warn_options(settings: Settings) -> None:
    """Log a warning that names the transport options that the broker does not have."""
    if unknown := list(unknown_options(settings)):
        logger.warning("%s", "; ".join(f"{name}: {text}" for name, text in unknown))


def refuse_patched() -> None:
    """Raise SettingsError when the process was patched for green threads: the loop would never let them run."""
    if library := patched_by():
        raise SettingsError(
            f"this process is monkey-patched by {library}, which does not go with the main process of a worker. "
            f"Take the patching out of what the worker imports: -P {library} patches the children itself"
        )


def purge(program: Program, queues: Sequence[str]) -> None:
    """Delete what waits in the queues; the connection for it is closed again, as the worker is about to fork."""
    from fastq.brokers import open_publisher

    publisher = open_publisher(str(program.settings.broker_url), program.settings)
    count = 0
    for name in queues:
        publisher.declare(name)
        count += publisher.purge(name)
    publisher.close()
    if count:
        click.echo(f"purge: Erased {plural(count, 'message')} from the queue.\n")
