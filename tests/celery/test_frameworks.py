"""Django and Flask projects, written as their manuals say, under either worker."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
import redis

from tests.support.servers import Redis, wait_until
from tests.support.worker_process import ROOT, Program, WorkerProcess

pytestmark = pytest.mark.redis

ALONE = ("--without-gossip", "--without-mingle")
START = Callable[..., WorkerProcess]

DJANGO = {
    "mysite/__init__.py": "from .celery import app as celery_app\n__all__ = ('celery_app',)\n",
    "mysite/celery.py": """
import os
from celery import Celery
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
app = Celery("mysite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
""",
    "mysite/settings.py": """
import os
SECRET_KEY = "for tests"
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["SITE_DB"]}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "Europe/Berlin"
CELERY_TIMEZONE = "Europe/Berlin"
CELERY_BROKER_URL = CELERY_RESULT_BACKEND = os.environ["SITE_BROKER"]
CELERY_TASK_DEFAULT_QUEUE = "site"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
""",
    "shop/__init__.py": "",
    "shop/apps.py": """
import os
from celery import signals
from django.apps import AppConfig
from django.core.checks import register

def note(text):
    with open(os.environ["SITE_NOTES"], "a") as file:
        file.write(text + "\\n")

class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        from django.db import connection
        with connection.cursor() as cursor:  # a connection that must not be inherited
            cursor.execute("select 1")

@register()
def looked_at(app_configs, **options):
    note("checked")
    return []

@signals.celeryd_after_setup.connect
def before_the_fork(**_):
    from django.db import connection
    note(f"connection before the fork: {connection.connection is not None}")
""",
    "shop/models.py": """
from django.db import models

class Order(models.Model):
    article = models.CharField(max_length=50)
    paid = models.BooleanField(default=False)
""",
    "shop/tasks.py": """
import os
from celery import shared_task
from django.db import connection, transaction
from django.utils import timezone
from shop.models import Order

@shared_task
def order(article):
    was_open = connection.connection is not None
    with transaction.atomic():
        made = Order.objects.create(article=article)
        pay.delay_on_commit(made.pk)
        seen = Order.objects.filter(paid=True).count()
    return [was_open, seen, connection.connection is not None, os.getpid()]

@shared_task
def undone(article):
    try:
        with transaction.atomic():
            pay.delay_on_commit(Order.objects.create(article=article).pk)
            raise KeyError(article)
    except KeyError:
        return Order.objects.filter(article=article).count()

@shared_task(bind=True, ignore_result=True)
def pay(self, key):
    Order.objects.filter(pk=key).update(paid=True)

@shared_task(bind=True)
def facts(self):
    kinds = [each.__name__ for each in type(self).__mro__]
    zone = str(timezone.get_current_timezone())
    return ["DjangoTask" in kinds, zone, self.app.main, self.name,
            type(self.app.now()).__name__, timezone.is_aware(self.app.now())]
""",
}

FLASK = {
    "site_app.py": """
import os
from celery import Celery, Task, shared_task
from flask import Flask, current_app, g

def create_app():
    app = Flask("shop")
    app.config.from_mapping(CELERY=dict(
        broker_url=os.environ["SITE_BROKER"], result_backend=os.environ["SITE_BROKER"],
        broker_connection_retry_on_startup=True, task_default_queue="site",
    ))
    app.config.from_prefixed_env()

    @app.teardown_appcontext
    def torn_down(error):
        with open(os.environ["SITE_NOTES"], "a") as file:
            file.write(f"torn down {g.get('x')} {error!r}\\n")

    celery_init_app(app)
    return app

def celery_init_app(app):
    class FlaskTask(Task):
        def __call__(self, *args, **kwargs):
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app

@shared_task(ignore_result=False)
def named(x):
    fresh = "x" not in g
    g.x = x
    return [current_app.name, fresh]

@shared_task(ignore_result=False)
def failing():
    raise LookupError(current_app.name)
""",
    "make_celery.py": """
from site_app import create_app
flask_app = create_app()
celery_app = flask_app.extensions["celery"]
""",
}


class Site:
    """A project in a folder, its worker, and a plain Celery client of it."""

    def __init__(
        self, folder: Path, url: str, program: Program, start_worker: START, words: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.words = words
        self.program = program
        self._start_worker = start_worker
        self.client = celery.Celery("client", broker=url, backend=url, set_as_current=False)
        self.client.conf.task_default_queue = "site"
        self.environment = {
            "SITE_BROKER": url,
            "SITE_DB": str(folder / "site.db"),
            "SITE_NOTES": str(folder / "notes"),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        }

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(text, encoding="utf-8")

    def manage(self, *words: str) -> None:
        """Run a command of Django's."""
        subprocess.run(
            [sys.executable, "-m", "django", *words],
            cwd=self.folder,
            env={**os.environ, **self.environment, "DJANGO_SETTINGS_MODULE": "mysite.settings"},
            capture_output=True,
            check=True,
            timeout=60,
        )

    def worker(self, app: str, *arguments: str, **environment: str) -> WorkerProcess:
        return self._start_worker(
            "-c1",
            *ALONE,
            *self.words,
            *arguments,
            app=app,
            program=self.program,
            env={**self.environment, **environment},
        )

    def call(self, name: str, *args: Any) -> Any:
        return self.client.send_task(name, args).get(timeout=20)

    def notes(self) -> list[str]:
        file = Path(self.environment["SITE_NOTES"])
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@pytest.fixture(
    params=[("celery",), ("fastq",), ("fastq", "--pool-start-method", "spawn")],
    ids=["under_celery", "under_fastq", "spawned_under_fastq"],
)
def site(request: pytest.FixtureRequest, tmp_path: Path, redis_server: Redis, start_worker: START) -> Iterator[Site]:
    """A site without files, for one of the programs."""
    url = redis_server.url(7)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    folder = tmp_path / "site"
    folder.mkdir()
    program, *words = request.param
    made = Site(folder, url, program, start_worker, tuple(words))
    yield made
    made.client.close()


@pytest.fixture
def django_site(site: Site) -> Site:
    """The Django project with its tables."""
    site.write(DJANGO)
    site.manage("makemigrations", "shop")
    site.manage("migrate")
    Path(site.environment["SITE_NOTES"]).unlink()
    return site


def paid(site: Site) -> list[tuple[str, int]]:
    database = sqlite3.connect(site.environment["SITE_DB"], timeout=20)
    try:
        return database.execute("SELECT article, paid FROM shop_order ORDER BY id").fetchall()
    finally:
        database.close()


def test_a_django_project_runs(django_site: Site) -> None:
    worker = django_site.worker("mysite")
    assert ".> site             exchange=site(direct) key=site" in worker.log()
    assert ["  . shop.tasks." + name in worker.log() for name in ("order", "pay", "facts")] == [True] * 3
    notes = django_site.notes()
    assert notes.count("checked") >= 1
    assert notes[-1] == "connection before the fork: False"

    first, second = django_site.call("shop.tasks.order", "book"), django_site.call("shop.tasks.order", "lamp")
    # Closed before each task, and open in it.
    assert [first[0], first[2]] == [second[0], second[2]] == [False, True]
    assert first[3] == second[3], "the same child"
    assert django_site.call("shop.tasks.undone", "chair") == 0
    wait_until(lambda: paid(django_site) == [("book", 1), ("lamp", 1)], 20, lambda: AssertionError(paid(django_site)))
    assert django_site.call("shop.tasks.facts") == [
        True, "Europe/Berlin", "mysite", "shop.tasks.facts", "datetime", True,
    ]  # fmt: skip
    assert worker.stop() == 0


@pytest.mark.parametrize("variable", ["CELERY_SKIP_CHECKS", "SKIP_CHECKS"])
def test_django_does_not_check_a_project_when_told_so(django_site: Site, variable: str) -> None:
    django_site.worker("mysite.celery:app", **{variable: "1"})
    assert "checked" not in django_site.notes()


def test_a_django_project_that_is_broken_does_not_start(django_site: Site) -> None:
    django_site.write({"shop/tasks.py": "from shop.models import NoSuchModel\n"})
    worker = django_site._start_worker(
        *ALONE, app="mysite", program=django_site.program, env=django_site.environment, await_ready=False
    )
    assert worker.wait() == 1
    assert "cannot import name 'NoSuchModel'" in worker.log()


def test_a_flask_project_s_tasks_run_in_its_context(site: Site) -> None:
    site.write(FLASK)
    worker = site.worker("make_celery")
    assert site.call("site_app.named", 1) == ["shop", True]
    assert site.call("site_app.named", 2) == ["shop", True]
    with pytest.raises(LookupError, match="shop"):
        site.call("site_app.failing")
    assert worker.stop() == 0
    assert site.notes() == ["torn down 1 None", "torn down 2 None", "torn down None LookupError('shop')"]
