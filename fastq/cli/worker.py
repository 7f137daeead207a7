"""``fastq worker``: reads the options, prepares the process, runs the worker. What a worker does is in fastq.worker.

Order: working directory, umask, detach, log and pid file, user and group, application, logging, banner, worker. Files
are opened while we still may; user code is imported only after root was given up, and after all forking into the
background.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from fastq import __version__
from fastq.amqp.topology import Topology
from fastq.amqp.url import mask_url
from fastq.cli import Globals
from fastq.cli.errors import Misuse, one_line, run_guarded
from fastq.cli.options import accepted, misplaced_globals, name_list, refused
from fastq.errors import FastqError
from fastq.worker.banner import Banner
from fastq.worker.daemon import (
    Daemon,
    change_directory,
    detach_process,
    drop_privileges,
    is_detached,
    set_umask,
    warn_root,
)
from fastq.worker.log import LEVELS, open_handler, setup_logging
from fastq.worker.options import WorkerOptions, available_cpus, expand_path
from fastq.worker.pidfile import Pidfile

if TYPE_CHECKING:
    from fastq.app import FastQ

logger = logging.getLogger("fastq.worker")

POOLS = click.Choice(["prefork", "processes", "threads", "solo", "gevent", "eventlet", "custom"])


def _concurrency(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return the number of children; ``auto`` counts the processors that this process may use."""
    if value is None:
        return None
    if value == "auto":
        return available_cpus()
    if not value.isdigit():
        raise click.BadParameter(f"{value!r} is not a whole number, nor 'auto'", ctx, param)
    return int(value)


def _pool(ctx: click.Context, param: click.Parameter, value: str) -> None:
    if value not in ("prefork", "processes"):
        raise Misuse(f"option -P/--pool {value} is not carried by this version of fastq; remove it to use prefork")


@click.command("worker")
@click.option("-n", "--hostname", default="", metavar="NAME", help="Node name; expands %h %n %d. Default fastq@%h.")
@click.option("-c", "--concurrency", metavar="N", callback=_concurrency, help="Child processes; 'auto': by CPU quota.")
@click.option("-Q", "--queues", type=name_list, default="", metavar="A,B", help="Queues to consume.")
@click.option("-X", "--exclude-queues", type=name_list, default="", metavar="A,B", help="Queues to leave out.")
@click.option("-I", "--include", type=name_list, default="", metavar="A,B", help="More modules to import.")
@click.option("-l", "--loglevel", type=click.Choice(LEVELS, case_sensitive=False), default="WARNING", show_default=True)
@click.option("-f", "--logfile", default="", help="Log file; expands %n %h %d %p %i %I. Default: standard error.")
@click.option("--pidfile", default="", help="Pid file; expands the same. Empty: none.")
@click.option("--prefetch-multiplier", type=int, help="Messages held per child; 0: no limit.")
@click.option("--time-limit", type=float, help="Seconds after which the child that runs a task is killed.")
@click.option("--soft-time-limit", type=float, help="Seconds after which SoftTimeLimitExceeded is raised in the task.")
@click.option("--max-tasks-per-child", type=int, help="Replace a child after this many tasks.")
@click.option("--max-memory-per-child", type=int, help="Replace a child that uses more KiB than this.")
@click.option("--reliable/--compat", default=None, help="Acknowledge after the task has run, or before as Celery does.")
@click.option("--grace", type=float, help="Seconds that running tasks have to end after a warm stop was asked for.")
@click.option("--purge", "--discard", is_flag=True, help="Delete what waits in the queues before starting.")
@click.option("-O", "--optimization", type=click.Choice(["default", "fair"]), default="default", hidden=True)
@click.option("-P", "--pool", type=POOLS, default="prefork", callback=_pool, expose_value=False, hidden=True)
@accepted("--without-gossip")
@accepted("--without-mingle")
@accepted("--without-heartbeat")
@click.option("-D", "--detach", is_flag=True, help="Go on in the background.")
@click.option("--workdir", default="", help="Change to this directory first.")
@click.option("--uid", default="", help="Become this user once the files are open.")
@click.option("--gid", default="", help="Become this group once the files are open.")
@click.option("--umask", default="", metavar="OCTAL", help="File mode mask.")
@refused("-E", "--task-events", "--events", takes_value=False)
@refused("--autoscale", why="give a fixed number of children with -c, and change it with the signals TTIN and TTOU")
@refused("-B", "--beat", takes_value=False)
@refused("-s", "--schedule-filename", "--schedule")
@refused("--scheduler")
@refused("-S", "--statedb")
@refused("--disable-prefetch", takes_value=False, why="remove it and give --prefetch-multiplier 1")
@refused("--heartbeat-interval")
@refused("--pool-start-method")
@refused("--executable")
@misplaced_globals
@click.pass_obj
def command(
    settings: Globals,
    /,
    workdir: str,
    uid: str,
    gid: str,
    umask: str,
    detach: bool,
    grace: float | None,
    **options: Any,
) -> int:
    """Run tasks until told to stop.

    TERM or INT stops warm: running tasks end first. A second one, or QUIT, stops at once. HUP restarts.
    """
    settings.require_app()
    if workdir:
        change_directory(workdir)
    if umask:
        set_umask(umask)
    asked = WorkerOptions(**options, grace_s=grace, color=settings.color, quiet=settings.quiet)
    start = Start(settings, asked, uid, gid)
    if not detach or is_detached():
        return start.run()
    start.daemon = detach_process()
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
    daemon: Daemon | None = None

    def run(self) -> int:
        """Open the files, drop privileges, load the application, and run the worker until it ends."""
        handler = open_handler(self.options.logfile, self.options.hostname)
        with Pidfile(expand_path(self.options.pidfile, self.options.hostname)):
            drop_privileges(self.uid, self.gid, handler.stream)
            app = self._load_app()
            full = self.options.resolved(app.conf)
            setup_logging(handler, self.options.loglevel, app.conf, self.options.color)
            warn_root(app.conf.accept_content)
            if not self.options.quiet:
                show_banner(app, full)
            if full.purge:
                purge(app, full.queues)
            if self.daemon is not None:
                self.daemon.started()
            return self._work(app, full)

    def _work(self, app: FastQ, options: WorkerOptions) -> int:
        # Imported only now: it brings the event loop, which a start that fails has no use for.
        from fastq.worker.worker import Worker

        try:
            return Worker(app, options).run()
        except FastqError as error:
            if options.logfile:
                # Standard error, where it is said as well, may be nowhere by now.
                logger.critical("%s", one_line(str(error)))
            raise

    def _load_app(self) -> FastQ:
        from fastq.cli.loader import import_module, load_tasks

        app = self.settings.load_app()
        if self.options.reliable is not None:
            app.conf.fastq_reliable = self.options.reliable
        for name in self.options.include:
            import_module(name, f"-I {name}")
        load_tasks(app)
        app.finalize()
        return app


def show_banner(app: FastQ, options: WorkerOptions) -> None:
    """Print the banner, and the tasks at log level INFO and below."""
    banner = Banner(
        hostname=options.hostname,
        version=__version__,
        app=app.main or "unnamed",
        transport=mask_url(str(app.conf.broker_url)),
        results=mask_url(str(app.conf.result_backend)),
        concurrency=options.concurrency or 1,
        queues=map(Topology(app.conf).spec, options.queues),
        tasks=app.tasks,
        mode="reliable" if options.reliable else "compat",
    )
    click.echo(banner.text())
    if options.loglevel in ("DEBUG", "INFO"):
        click.echo(banner.task_list())


def purge(app: FastQ, queues: Sequence[str]) -> None:
    """Delete what waits in the queues; the connection for it is closed again, as the worker is about to fork."""
    for name in queues:
        app.publisher.declare(name)
        app.publisher.purge(name)
    app.publisher.close()
