"""The application: settings, the registry of tasks, and the public words. What it sends goes through its ``sender``."""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, cast, overload

from fastq import result as results
from fastq.errors import SettingsError
from fastq.modules import MAIN_NAMES, import_named, import_object, import_related, main_module_name
from fastq.net.threads import in_thread
from fastq.request import current
from fastq.sending.absent import APP_ATTRIBUTES, lacking
from fastq.sending.options import SendOptions, TaskOptions, check_names
from fastq.sending.sender import Sender
from fastq.settings import Settings, settings_of
from fastq.steps import Step, checked
from fastq.task import Task
from fastq.wire.ids import new_id

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastq.interfaces import Publisher, ResultStore
    from fastq.sending.envelope import PublishRetry
    from fastq.sending.on_loop import LoopSender
    from fastq.wire.message import Message

P = ParamSpec("P")
R = TypeVar("R")
Self_ = TypeVar("Self_", bound="Task[..., Any]")
TaskType = TypeVar("TaskType", bound="Task[..., Any]")

#: Surrounds the calls of a process; called with the application.
Lifespan: TypeAlias = "Callable[[FastQ], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]"

#: How the settings begin that say where and how to connect.
_CONNECTING = ("broker_", "result_", "redis_")

_apps: weakref.WeakSet[FastQ] = weakref.WeakSet()
#: What every application that is made gets to see: shared tasks join it so.
_joining: list[Callable[[FastQ], object]] = []
_last_app: FastQ | None = None


@lacking(APP_ATTRIBUTES, "a FastQ application has no")
class FastQ:
    """A task queue application.

    ``name`` is shown to people; it stands for the module of tasks that are defined where no file is (a prompt). Any
    setting can be given as a keyword; it wins over ``config`` (an object, a mapping, or the name of a module).
    ``steps`` are what happens around the calls of all tasks, the outermost first.

    ``lifespan`` is called with the application and returns a context manager, which is entered once in each process
    that runs calls, before the first one; what it gives is at ``app.state``. An asynchronous one is entered by the
    processes whose event loops run coroutine functions, on that loop.

    A pickle or copy of it is the application itself; in a process that has not got it, a new one with its settings.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        broker: str | Sequence[str] | None = None,
        backend: str | None = None,
        include: Sequence[str] | None = None,
        config: object = None,
        steps: Sequence[Step] = (),
        lifespan: Lifespan | None = None,
        **settings: Any,
    ) -> None:
        global _last_app
        self.main = name
        keywords = {"broker_url": broker, "result_backend": backend, "include": include}
        self.conf = Settings({**{key: value for key, value in keywords.items() if value is not None}, **settings})
        self.tasks: dict[str, Task[..., Any]] = {}
        self.steps = checked(steps)
        self.lifespan = lifespan
        #: What the lifespan gives, in a process that runs calls.
        self.state: Any = None
        self.sender = Sender(self.conf, self.tasks, self)
        self._loop_sender: LoopSender | None = None
        self._discover: list[tuple[Iterable[str] | Callable[[], Iterable[str]], str]] = []
        self._token = new_id()  # forked processes have it too: a pickle finds the application by it
        if config is not None:
            self.config_from_object(config)
        for join in _joining:
            join(self)
        _apps.add(self)
        _last_app = self

    def __repr__(self) -> str:
        return f"<FastQ {self.main or 'unnamed'}: {len(self.tasks)} tasks>"

    def __reduce__(self) -> Any:
        return _app_of, (self._token, self.main, self.conf.given())

    # --- configuration -----------------------------------------------------------------------------------------------

    def config_from_object(self, source: object, namespace: str | None = None) -> None:
        """Take settings from an object, a mapping, or a module given by name (``module`` or ``module:attribute``)."""
        self.conf.load(settings_of(import_object(source) if isinstance(source, str) else source, namespace))

    def config_from_envvar(self, variable: str, namespace: str | None = None) -> None:
        """Take settings from the module that an environment variable names."""
        module = os.environ.get(variable)
        if not module:
            raise SettingsError(f"environment variable {variable!r} is not set; it should name a module with settings")
        self.config_from_object(module, namespace)

    def finalize(self) -> None:
        """Settle the configuration; called by the first use. Tasks may still be added, settings no longer change."""
        self.sender.finalize()

    @contextmanager
    def override(self, **settings: Any) -> Iterator[None]:
        """Change settings inside a ``with`` block; for tests.

        Where they say how to connect, the block has connections of its own, closed at its end.
        """
        self.finalize()
        try:
            with ExitStack() as stack:
                if any(name.startswith(_CONNECTING) for name in settings):
                    stack.enter_context(self.loop_sender.set_aside())
                    stack.enter_context(self.sender.set_aside())
                stack.enter_context(self.conf.override(**settings))
                self.sender.settle()
                yield
        finally:
            self.sender.settle()

    # --- tasks -------------------------------------------------------------------------------------------------------

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...

    @overload
    def task(
        self, /, *, bind: Literal[True], base: type[Task[..., Any]] | None = None, **options: Unpack[TaskOptions]
    ) -> Callable[[Callable[Concatenate[Self_, P], R]], Task[P, R]]: ...

    @overload
    def task(
        self,
        /,
        *,
        bind: Literal[False] = False,
        base: type[Task[..., Any]] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...

    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        bind: bool = False,
        base: type[Task[..., Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Make a function a task: ``@app.task``, or ``@app.task(...)`` with options (see ``TaskOptions``).

        ``bind=True`` passes the task itself as the function's first argument; ``base`` is the class of the task.
        """
        if function is None:
            return lambda function: self.add_task(function, bind, base, cast("TaskOptions", options))
        return self.add_task(function, bind, base, cast("TaskOptions", options))

    def add_task(
        self, function: Callable[..., R], bind: bool, base: type[Task[..., Any]] | None, options: TaskOptions
    ) -> Task[..., R]:
        """Register a function as a task and return it."""
        check_function(function)
        task = made_task(base)
        task.declare(self, options.get("name") or self.name_of(function), function, options, bind)
        return self._register(task)

    def register_task(self, task: TaskType | type[TaskType]) -> TaskType:
        """Register an instance (or the class) of a Task subclass with a ``run`` method and return the task."""
        made = task() if isinstance(task, type) else task
        made.declare(self, made.name or self.name_of(type(made)), None, {}, True)
        return self._register(made)

    def _register(self, task: TaskType) -> TaskType:
        known = self.tasks.get(task.name)
        if known is not None and _origin(known) != _origin(task):
            raise SettingsError(
                f"two tasks have the name {task.name!r}: {'.'.join(_origin(known))} and {'.'.join(_origin(task))}; "
                "give one another name: @app.task(name=...)"
            )
        self.tasks[task.name] = task
        if self.sender.is_final:
            task.settle(self.conf)
        return task

    def name_of(self, function: Callable[..., Any]) -> str:
        """Return the name that a task of this function gets: ``module.function``, with a real name for ``__main__``.

        A program's functions are named as in a worker, which imports its file.
        """
        module = function.__module__
        if module in MAIN_NAMES:
            module = main_module_name(module, self.main)
        return f"{module}.{getattr(function, '__name__', type(function).__name__)}"

    def autodiscover_tasks(
        self, packages: Iterable[str] | Callable[[], Iterable[str]], related_name: str | None = "tasks"
    ) -> None:
        """Have ``load_tasks`` import ``<package>.tasks`` of each package that has one."""
        self._discover.append((packages, related_name or ""))

    def load_tasks(self) -> None:
        """Import the modules that hold tasks: ``include``, ``imports`` and what ``autodiscover_tasks`` was given."""
        for setting in ("imports", "include"):
            for module in self.conf[setting]:
                import_named(module, f"setting {setting!r}")
        for packages, related_name in self._discover:
            for package in packages() if callable(packages) else packages:
                import_related(package, related_name)

    def tasks_by_queue(self) -> dict[str, list[str]]:
        """Return the names of the tasks by the queue that their calls go to, as far as the name alone decides that."""
        envelopes, found = self.sender.envelopes, dict[str, list[str]]()
        for name, task in sorted(self.tasks.items()):
            if envelopes.routes_are_static or task.queue is not None:
                envelope = envelopes.of_task(task)
                if not envelope.exchange:
                    found.setdefault(envelope.routing_key, []).append(name)
        return found

    def exceptions_of(self, task_name: str | None) -> Sequence[type[BaseException]]:
        """Return the exception classes that a task names: stored ones are rebuilt with their own constructors."""
        task = self.tasks.get(task_name) if task_name is not None else None
        if task is None:
            return ()
        return task.throws if task.autoretry is None else (*task.throws, *task.autoretry.retry_for)

    @property
    def current_task(self) -> Task[..., Any] | None:
        """Return the task whose call is running here."""
        request = current()
        return None if request is None or request.task is None else self.tasks.get(request.task)

    def pickled_task(self, task: Task[..., Any]) -> Any:
        """Return how pickle and copy find a task of this application."""
        return _task_of, (task.__module__, self._token, self.main, task.name)

    # --- sending -----------------------------------------------------------------------------------------------------

    def send_task(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SendOptions],
    ) -> results.AsyncResult[Any]:
        """Send a task by name, registered here or not, and return the handle on its result."""
        check_names(options, SendOptions.__optional_keys__, "send_task()")
        if args is not None and not isinstance(args, (list, tuple)):
            raise TypeError(f"args is {args!r:.80}; expected a list or tuple of positional arguments")
        return self.sender.send_task(name, args or (), dict(kwargs or {}), options)

    async def asend_task(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SendOptions],
    ) -> results.AsyncResult[Any]:
        """Do as ``send_task`` does without blocking the event loop."""
        check_names(options, SendOptions.__optional_keys__, "asend_task()")
        if args is not None and not isinstance(args, (list, tuple)):
            raise TypeError(f"args is {args!r:.80}; expected a list or tuple of positional arguments")
        return await self.loop_sender.send_task(name, args or (), dict(kwargs or {}), options)

    def publish(self, messages: Sequence[Message], retry: PublishRetry | None = None) -> None:
        """Return when the broker has confirmed the messages; inside ``batch``, when they are collected."""
        self.sender.publish(messages, retry)

    def batch(self) -> AbstractContextManager[None]:
        """Collect what is sent inside a ``with`` block and publish it at the end, with one wait for all.

        What other threads and coroutines send meanwhile is not collected. After an exception in the block nothing is
        published, and who waits for its results is told so. Inside another batch, it joins that one.
        """
        return self.sender.batch()

    def abatch(self) -> AbstractAsyncContextManager[None]:
        """Do as ``batch`` does, in ``async with``, without blocking the event loop at its end."""
        return self.loop_sender.batch()

    def is_collected(self, task_id: str) -> bool:
        """Return whether a call waits for the end of the ``batch`` that is collected here."""
        return self.sender.is_collected(task_id)

    @property
    def publisher(self) -> Publisher:
        """Return the connection to the broker, opened at first use."""
        return self.sender.publisher

    @publisher.setter
    def publisher(self, publisher: Publisher | None) -> None:
        self.sender.publisher = publisher

    @property
    def stores_results(self) -> bool:
        """Return whether there is a result store."""
        return self.sender.stores_results

    @property
    def store(self) -> ResultStore:
        """Return the result store, opened at first use. Raises ResultsDisabled when there is none."""
        return self.sender.store

    @store.setter
    def store(self, store: ResultStore | None) -> None:
        self.sender.store = store

    def AsyncResult(self, task_id: str, task_name: str | None = None) -> results.AsyncResult[Any]:  # noqa: N802 - Celery's word
        """Return the handle on a task that was sent before."""
        return results.AsyncResult(task_id, self, task_name)

    @property
    def loop_sender(self) -> LoopSender:
        """Return what sends from event loops; made when it is first asked for."""
        if self._loop_sender is None:
            from fastq.sending.on_loop import LoopSender  # imports asyncio: not for children that do without it

            self._loop_sender = LoopSender(self.sender)
        return self._loop_sender

    def close(self) -> None:
        """Close the connections; a later use opens new ones. Those of event loops are closed there, soon."""
        if self._loop_sender is not None:
            self._loop_sender.leave()
        self.sender.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop, then do as ``close`` does without blocking it."""
        await self.loop_sender.aclose()
        await in_thread(self.close)


def _app_of(token: str, name: str | None, settings: dict[str, Any]) -> FastQ:
    """Return the application that was pickled: itself here and in a forked process, else one like it."""
    global _last_app
    known = list(_apps)
    found = next((app for app in known if app._token == token), None) or next(
        (app for app in known if app.main == name and app.conf.given() == settings), None
    )
    if found is None:
        before = _last_app
        found = FastQ(name, **settings)
        found._token = token
        _last_app = before or found  # who unpickles something has not made an application
    return found


def _task_of(module: str, token: str, app_name: str | None, name: str) -> Task[..., Any]:
    """Return the task that was pickled, of the application it belonged to if that is here."""
    if module not in MAIN_NAMES:
        importlib.import_module(module)
    known = [app for app in list(_apps) if name in app.tasks and app_name == app.main]
    found = next((app for app in known if app._token == token), known[0] if known else None)
    if found is None:
        from pickle import UnpicklingError  # large, and loaded already where something is unpickled

        raise UnpicklingError(f"no application here has the task {name!r}; import the one that it belongs to first")
    return found.tasks[name]


def current_app() -> FastQ:
    """Return the application that was made last; without any, a new one on the settings of the environment."""
    return _last_app if _last_app is not None else FastQ()


def join_all(join: Callable[[FastQ], object]) -> None:
    """Have this called with every application, those that are made later included."""
    _joining.append(join)
    for app in list(_apps):
        join(app)


def apps() -> list[FastQ]:
    """Return the applications of this process, the current one first."""
    return [current_app(), *_apps]


def set_current_app(app: FastQ) -> None:
    """Make an application the one that shared tasks belong to in this process."""
    global _last_app
    _last_app = app


def check_function(function: Any) -> None:
    """Raise TypeError for what no task can be made of."""
    if not callable(function):
        raise TypeError(f"@app.task is for functions, not for {function!r:.80}; options are given by name")
    if isinstance(function, type):
        remedy = (
            "register it: app.register_task(...)" if issubclass(function, Task) else "write a function that uses it"
        )
        raise TypeError(f"@app.task is for functions, and {function.__qualname__!r} is a class; {remedy}")


def made_task(base: Any) -> Task[..., Any]:
    """Return a new task of a class. Raises TypeError for a class of anything else."""
    if base is not None and not (isinstance(base, type) and issubclass(base, Task)):
        raise TypeError(f"base is {base!r:.80}; expected a subclass of fastq.Task")
    return (base or Task)()


def _origin(task: Task[..., Any]) -> tuple[str, str]:
    """Return where a task was written; the same place again is a reload, not a conflict."""
    function = getattr(task, "__wrapped__", type(task))
    return function.__module__, function.__qualname__
