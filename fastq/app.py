"""The application: settings, the registry of tasks, and the one place where messages leave a process (``publish``).

Opens its publisher and result store when they are first needed, from the URLs in the settings; both can be set instead.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, overload

from fastq import result as results
from fastq.errors import ConnectionLost, FastqError, NotRegistered, PublishError, ResultsDisabled, SettingsError
from fastq.request import current, running_message
from fastq.sending.absent import APP_ATTRIBUTES, lacking
from fastq.sending.envelope import Envelope, Envelopes, PublishRetry
from fastq.sending.options import SendOptions, TaskOptions, check_names, text_option
from fastq.settings import Settings, settings_of
from fastq.steps import Step, checked
from fastq.task import Task
from fastq.wire.ids import new_id
from fastq.wire.message import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastq.interfaces import Publisher, ResultStore
    from fastq.sending.sent import SentEvents

P = ParamSpec("P")
R = TypeVar("R")
Self_ = TypeVar("Self_", bound="Task[..., Any]")
TaskType = TypeVar("TaskType", bound="Task[..., Any]")

_MAX_NAMED_ENVELOPES = 1024  # chosen: send_task with made-up names must not grow without bound

#: How the settings begin that say where and how to connect.
_CONNECTING = ("broker_", "result_", "redis_")

#: What the running program is called as a module; the second in a process that multiprocessing has spawned.
_MAIN = ("__main__", "__mp_main__")

_apps: weakref.WeakSet[FastQ] = weakref.WeakSet()
_shared: list[SharedTask] = []
_last_app: FastQ | None = None


@dataclass(slots=True)
class _Batch:
    """What a thread has collected in ``app.batch()``: the messages, and the handles that it gave out for them."""

    messages: list[Message] = field(default_factory=list)
    sent: list[results.AsyncResult[Any]] = field(default_factory=list)


class _Thread(threading.local):
    """A thread's batch; None outside of one."""

    batch: _Batch | None = None


@lacking(APP_ATTRIBUTES, "a FastQ application has no")
class FastQ:
    """A task queue application.

    ``name`` is shown to people; it stands for the module of tasks that are defined where no file is (a prompt). Any
    setting can be given as a keyword; it wins over ``config`` (an object, a mapping, or the name of a module).
    ``steps`` are what happens around the calls of all tasks, the outermost first.

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
        **settings: Any,
    ) -> None:
        global _last_app
        self.main = name
        keywords = {"broker_url": broker, "result_backend": backend, "include": include}
        self.conf = Settings({**{key: value for key, value in keywords.items() if value is not None}, **settings})
        self.tasks: dict[str, Task[..., Any]] = {}
        self.steps = checked(steps)
        self._lock = threading.RLock()
        self._thread = _Thread()
        self._discover: list[tuple[Iterable[str] | Callable[[], Iterable[str]], str]] = []
        self._envelopes: Envelopes | None = None
        self._named: dict[str, Envelope] = {}
        self._publisher: Publisher | None = None
        self._store: ResultStore | None = None
        self._declared: set[str] = set()
        self._sent: SentEvents | None = None
        self._token = new_id()  # forked processes have it too: a pickle finds the application by it
        if config is not None:
            self.config_from_object(config)
        for shared in _shared:
            shared.join(self)
        _apps.add(self)
        _last_app = self

    def __repr__(self) -> str:
        return f"<FastQ {self.main or 'unnamed'}: {len(self.tasks)} tasks>"

    def __reduce__(self) -> Any:
        return _app_of, (self._token, self.main, self.conf.given())

    # --- configuration -----------------------------------------------------------------------------------------------

    def config_from_object(self, source: object, namespace: str | None = None) -> None:
        """Take settings from an object, a mapping, or a module given by name (``module`` or ``module:attribute``)."""
        self.conf.load(settings_of(_import_object(source) if isinstance(source, str) else source, namespace))

    def config_from_envvar(self, variable: str, namespace: str | None = None) -> None:
        """Take settings from the module that an environment variable names."""
        module = os.environ.get(variable)
        if not module:
            raise SettingsError(f"environment variable {variable!r} is not set; it should name a module with settings")
        self.config_from_object(module, namespace)

    def finalize(self) -> None:
        """Settle the configuration; called by the first use. Tasks may still be added, settings no longer change."""
        if self._envelopes is not None:
            return
        with self._lock:
            if self._envelopes is None:
                self.conf.freeze()
                self._settle()

    @contextmanager
    def override(self, **settings: Any) -> Iterator[None]:
        """Change settings inside a ``with`` block; for tests.

        Where they say how to connect, the block has connections of its own, closed at its end.
        """
        self.finalize()
        aside = self._set_aside() if any(name.startswith(_CONNECTING) for name in settings) else nullcontext()
        try:
            with aside, self.conf.override(**settings):
                self._settle()
                yield
        finally:
            self._settle()

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Have no connections inside a ``with`` block but those that are opened there."""
        kept = self._publisher, self._store, self._declared
        self._publisher, self._store, self._declared = None, None, set()
        try:
            yield
        finally:
            self.close()
            self._publisher, self._store, self._declared = kept

    def _settle(self) -> None:
        self._envelopes = Envelopes(self.conf)
        self._named.clear()
        self._settle_events()
        for task in self.tasks.values():
            task.settle(self.conf)

    def _settle_events(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.close()
        url = str(self.conf.broker_url)
        if not self.conf.task_send_sent_event:
            return
        from fastq.brokers import has_bus
        from fastq.sending.sent import SentEvents

        self._sent = SentEvents(url, self.conf) if has_bus(url) else None

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
        if not callable(function):
            raise TypeError(f"@app.task is for functions, not for {function!r:.80}; options are given by name")
        task = _made(base)
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
        if self._envelopes is not None:
            task.settle(self.conf)
        return task

    def name_of(self, function: Callable[..., Any]) -> str:
        """Return the name that a task of this function gets: ``module.function``, with a real name for ``__main__``.

        A program's functions are named as in a worker, which imports its file.
        """
        module = function.__module__
        if module in _MAIN:
            module = _main_module_name(module, self.main)
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
                _import_named(module, f"setting {setting!r}")
        for packages, related_name in self._discover:
            for package in packages() if callable(packages) else packages:
                _import_related(package, related_name)

    def tasks_by_queue(self) -> dict[str, list[str]]:
        """Return the names of the tasks by the queue that their calls go to, as far as the name alone decides that."""
        envelopes, found = self.envelopes, dict[str, list[str]]()
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
        positional, named = args or (), dict(kwargs or {})
        if self.conf.task_always_eager:
            return self._send_eagerly(name, positional, named, options)
        if options and name not in self._named:  # checked before a connection is opened for the reply address
            self.envelopes.with_options(self.envelopes.of_name(name), options)
        envelope = self._envelope_of(name, positional, named)
        if options:
            envelope = self.envelopes.with_options(envelope, options)
        task_id = options.get("task_id")
        return self.send(envelope, new_id() if task_id is None else text_option("task_id", task_id), positional, named)

    def _send_eagerly(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: SendOptions
    ) -> results.AsyncResult[Any]:
        task = self.tasks.get(name)
        if task is None:
            raise NotRegistered(
                f"task {name!r} cannot run here and now (task_always_eager): {self!r} has no task of that name"
            )
        return task.apply_async(args, kwargs, **options)

    def send(
        self, envelope: Envelope, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> results.AsyncResult[Any]:
        """Publish one call and return the handle on its result; ``delay`` and all its relatives end here."""
        parent = running_message()
        self.publish((envelope.message(task_id, args, kwargs, parent),), envelope.publish_retry)
        sent: results.AsyncResult[Any] = results.AsyncResult(task_id, self, envelope.name, envelope.ignore_result)
        if self._thread.batch is not None:
            self._thread.batch.sent.append(sent)
        if parent is not None:
            parent.children.append(sent)
        return sent

    def publish(self, messages: Sequence[Message], retry: PublishRetry | None = None) -> None:
        """Return when the broker has confirmed the messages; every message of this process leaves here.

        What was lost with its connection or refused is sent again by the retry policy, then raised; what was confirmed
        never, nor what has only not been confirmed in time. ``fastq_publish_timeout`` is for all attempts together.
        """
        batch = self._thread.batch
        if batch is not None:
            batch.messages.extend(messages)
            return
        attempt, left = 0, messages
        deadline = time.monotonic() + self.conf.fastq_publish_timeout
        while True:
            try:
                self._publish_once(left, deadline)
                break
            except (ConnectionLost, PublishError) as error:
                policy = self.envelopes.default_retry if retry is None else retry
                if policy.max_retries is not None and attempt >= policy.max_retries:
                    raise
                if isinstance(error, PublishError) and error.again is not None:
                    if not error.again:
                        raise
                    left = cast("Sequence[Message]", error.again)
                pause_s = policy.pause_s(attempt)
                if time.monotonic() + pause_s >= deadline:
                    raise
            time.sleep(pause_s)
            attempt += 1
            # What the broker's restart has ended is there again before a worker can answer.
            with suppress(FastqError):
                self.reply_address(deadline)
        if self._sent is not None:
            self._sent.tell(messages)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Collect what this thread sends inside the ``with`` block and publish it at the end, with one wait for all.

        After an exception in the block nothing is published, and who waits for its results is told so. Inside another
        batch, it joins that one.
        """
        thread = self._thread
        if thread.batch is not None:
            yield
            return
        thread.batch = batch = _Batch()
        try:
            yield
        except BaseException as error:
            _drop(batch, error)
            raise
        finally:
            thread.batch = None
        if batch.messages:
            self.publish(batch.messages)

    def is_collected(self, task_id: str) -> bool:
        """Return whether a call waits for the end of this thread's ``batch``."""
        batch = self._thread.batch
        return batch is not None and any(message.id == task_id for message in batch.messages)

    def reply_address(self, deadline: float | None = None) -> str | None:
        """Return where workers send results to, None when the store needs no address."""
        running = running_message()
        if not self.stores_results or (running is not None and running.call is not None):
            return None  # a task in a worker does not wait for results, and its process has no connections
        return self.store.reply_address(deadline)

    def _publish_once(self, messages: Sequence[Message], deadline: float) -> None:
        publisher = self._publisher or self.publisher
        for message in messages:
            if not message.exchange and message.routing_key not in self._declared:
                self._declare(publisher, message.routing_key, deadline)
        publisher.publish(messages, deadline)

    def _declare(self, publisher: Publisher, queue: str, deadline: float) -> None:
        if self.conf.task_create_missing_queues or queue == self.conf.task_default_queue:
            publisher.declare(queue, deadline)
        self._declared.add(queue)

    def _envelope_of(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Envelope:
        envelope = self._named.get(name)
        if envelope is not None:
            return envelope
        envelopes = self.envelopes
        envelope = envelopes.routed(envelopes.of_name(name), args, kwargs, self.tasks.get(name))
        envelope.reply_to = None if envelope.ignore_result else self.reply_address()
        if envelopes.routes_are_static:
            if len(self._named) >= _MAX_NAMED_ENVELOPES:
                self._named.clear()
            self._named[name] = envelope
        return envelope

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def envelopes(self) -> Envelopes:
        """Return what makes this application's messages; finalizes it."""
        if self._envelopes is None:
            self.finalize()
        return cast("Envelopes", self._envelopes)

    @property
    def publisher(self) -> Publisher:
        """Return the connection to the broker, opened at first use."""
        if self._publisher is None:
            self.finalize()
            with self._lock:
                if self._publisher is None:
                    from fastq.brokers import open_publisher

                    self._publisher = open_publisher(cast("str", self.conf.broker_url), self.conf)
        return self._publisher

    @publisher.setter
    def publisher(self, publisher: Publisher | None) -> None:
        self._publisher = publisher
        self._declared.clear()

    @property
    def stores_results(self) -> bool:
        """Return whether there is a result store."""
        if self._store is None:
            self.finalize()
        return self._store is not None or self.conf.result_backend != "disabled"

    @property
    def store(self) -> ResultStore:
        """Return the result store, opened at first use. Raises ResultsDisabled when there is none."""
        if self._store is None:
            if not self.stores_results:
                raise ResultsDisabled("this application stores no results; name a store: FastQ(backend='rpc://')")
            with self._lock:
                if self._store is None:
                    from fastq.results import open_store

                    self._store = open_store(cast("str", self.conf.result_backend), self.conf)
        return self._store

    @store.setter
    def store(self, store: ResultStore | None) -> None:
        self._store = store
        self.forget_envelopes()

    def AsyncResult(self, task_id: str, task_name: str | None = None) -> results.AsyncResult[Any]:  # noqa: N802 - Celery's word
        """Return the handle on a task that was sent before."""
        return results.AsyncResult(task_id, self, task_name)

    def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        with self._lock:
            store, publisher = self._store, self._publisher
            self._store = self._publisher = None
        if self._sent is not None:
            self._sent.close()
        if store is not None:
            store.close()
        if publisher is not None:
            publisher.close()

    def forget_envelopes(self) -> None:
        """Prepare messages anew from the next one on: the reply address or the process has changed."""
        self._named.clear()
        for task in self.tasks.values():
            task.forget_envelope()

    def after_fork(self) -> None:
        """Drop what belongs to the parent process; runs in every forked child by itself."""
        self._lock = threading.RLock()
        self._thread.batch = None
        if self._sent is not None:
            self._sent.after_fork()
        self.forget_envelopes()


def _drop(batch: _Batch, error: BaseException) -> None:
    """Tell the handles that nothing was sent; a task has no such children."""
    for sent in batch.sent:
        sent.never_sent(error)
    parent = running_message()
    if parent is not None and parent.spawned:
        dropped = set(batch.sent)
        parent.spawned[:] = [child for child in parent.spawned if child not in dropped]


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
    if module not in _MAIN:
        importlib.import_module(module)
    known = [app for app in list(_apps) if name in app.tasks and app_name == app.main]
    found = next((app for app in known if app._token == token), known[0] if known else None)
    if found is None:
        from pickle import UnpicklingError  # large, and loaded already where something is unpickled

        raise UnpicklingError(f"no application here has the task {name!r}; import the one that it belongs to first")
    return found.tasks[name]


class SharedTask:
    """What ``@shared_task`` leaves in a module: the task of the current application, looked up at each use."""

    def __init__(
        self, function: Callable[..., Any], bind: bool, base: type[Task[..., Any]] | None, options: TaskOptions
    ) -> None:
        # No application may be there yet: what is wrong is said here, not where one is made.
        _made(base).declare(None, options.get("name") or function.__name__, function, options, bind)
        self._function = function
        self._declaration = (bind, base, options)
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__

    def join(self, app: FastQ) -> Task[..., Any]:
        """Make the task known to an application."""
        return app.add_task(self._function, *self._declaration)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function here and now, as a plain call."""
        return self._task()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task(), name)

    def __reduce__(self) -> str:
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<shared task {self.__module__}.{self.__name__}>"

    def _task(self) -> Task[..., Any]:
        app = current_app()
        name = self._declaration[2].get("name") or app.name_of(self._function)
        return app.tasks[name]


@overload
def shared_task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def shared_task(
    *, bind: Literal[True], base: type[Task[..., Any]] | None = None, **options: Unpack[TaskOptions]
) -> Callable[[Callable[Concatenate[Self_, P], R]], Task[P, R]]: ...


@overload
def shared_task(
    *, bind: Literal[False] = False, base: type[Task[..., Any]] | None = None, **options: Unpack[TaskOptions]
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def shared_task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    bind: bool = False,
    base: type[Task[..., Any]] | None = None,
    **options: Any,
) -> Any:
    """Make a function a task of every application, those that are made later included. Options as for ``app.task``."""

    def share(function: Callable[..., Any]) -> SharedTask:
        shared = SharedTask(function, bind, base, cast("TaskOptions", options))
        _shared.append(shared)
        for app in list(_apps):
            shared.join(app)
        return shared

    return share if function is None else share(function)


class CurrentTask:
    """The task whose call is running here, as ``fastq.current_task``; false, and without attributes, outside any."""

    def __getattr__(self, name: str) -> Any:
        task = running()
        if task is None:
            raise AttributeError(f"no task is running here, so current_task has no {name!r}")
        return getattr(task, name)

    def __bool__(self) -> bool:
        return running() is not None

    def __eq__(self, other: object) -> bool:
        return other is self or other is running()

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's function here and now."""
        return self.__getattr__("__call__")(*args, **kwargs)

    def __reduce__(self) -> str:
        return "current_task"

    def __repr__(self) -> str:
        return f"<current_task {running()!r}>"


current_task = CurrentTask()


def running() -> Task[..., Any] | None:
    """Return the task whose call is running here, of the current application if that has it."""
    request = current()
    if request is None or request.task is None:
        return None
    apps = [current_app(), *_apps]
    return next((app.tasks[request.task] for app in apps if request.task in app.tasks), None)


def current_app() -> FastQ:
    """Return the application that was made last; without any, a new one on the settings of the environment."""
    return _last_app if _last_app is not None else FastQ()


def set_current_app(app: FastQ) -> None:
    """Make an application the one that shared tasks belong to in this process."""
    global _last_app
    _last_app = app


def _import_object(path: str) -> object:
    module, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise SettingsError(f"the module with settings {module!r} is not found; is it on sys.path?") from error
    except AttributeError as error:
        raise SettingsError(f"module {module!r} has no {attribute!r} with settings") from error


def _import_named(module: str, where: str) -> None:
    """Import a module that the application names. Raises SettingsError, with the nearest one, when it is not there."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise SettingsError(f"{where} names {module!r}, which is not found{_near_module(error.name)}") from error


def _near_module(name: str) -> str:
    """Return a hint at the module that has nearly this name."""
    import difflib  # only needed on the way to an error
    import pkgutil

    package, _, last = name.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else [os.getcwd(), *sys.path]
    known = [each.name for each in pkgutil.iter_modules(path)]
    near = difflib.get_close_matches(last, known, 1)
    if not near:
        return f"; looked in {', '.join(path or ())}" if package else "; is it on the Python path?"
    found = f"{package}.{near[0]}" if package else near[0]
    return f"; did you mean {found!r}?"


def _import_related(package: str, related_name: str) -> None:
    """Import a package's module of tasks, if it has one; an import that fails inside it is an error as anywhere."""
    module = f"{package}.{related_name}" if related_name else package
    _import_named(package, "autodiscover_tasks()")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise


def _main_module_name(module: str, app_name: str | None) -> str:
    """Return the name under which a worker would import the program that is running; without a file, the app's."""
    main = sys.modules.get(module) or sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return cast("str", spec.name).removesuffix(".__main__")  # python -m package.module
    file = getattr(main, "__file__", None)
    if not file:
        return app_name or "__main__"
    path = Path(file).resolve()
    parts = [path.stem]
    # A script inside a package: the worker imports it by its full name.
    while (path.parent / "__init__.py").exists():
        path = path.parent
        parts.insert(0, path.name)
    found = ".".join(parts)
    # A namespace package has no such file; the application may say where it is.
    return app_name if app_name is not None and app_name.endswith(f".{found}") else found


def _made(base: Any) -> Task[..., Any]:
    """Return a new task of a class. Raises TypeError for a class of anything else."""
    if base is not None and not (isinstance(base, type) and issubclass(base, Task)):
        raise TypeError(f"base is {base!r:.80}; expected a subclass of fastq.Task")
    return (base or Task)()


def _origin(task: Task[..., Any]) -> tuple[str, str]:
    """Return where a task was written; the same place again is a reload, not a conflict."""
    function = getattr(task, "__wrapped__", type(task))
    return function.__module__, function.__qualname__


def _after_fork() -> None:
    for app in list(_apps):
        app.after_fork()


os.register_at_fork(after_in_child=_after_fork)
