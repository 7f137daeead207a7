"""A Flask application with background tasks, in the form that Flask's documentation gives, under either worker.

    python -m examples.celery_flask --with celery
    python -m examples.celery_flask --with fastq

Both print the same. Tasks run inside the Flask application's context, so that `current_app`, its configuration and its
extensions are there as in a view: `FlaskTask.__call__` pushes the context around each call. Tasks are shared tasks and
belong to no application until `celery_init_app` has made one and set it as the default.

By hand: `celery -A examples.celery_flask worker`, or the same with `fastq`; the worker finds `celery_app` below. The
settings of Celery stand in the Flask configuration under CELERY. The broker comes from EXAMPLE_BROKER.

Source of the pattern: flask.palletsprojects.com, "Background Tasks with Celery".
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, Task, shared_task
from celery.result import AsyncResult
from flask import Flask, current_app, request


def celery_init_app(app: Flask) -> Celery:
    """Return the Celery application of a Flask application; its tasks run in the latter's context."""

    class FlaskTask(Task):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app


@shared_task
def add_together(a: int, b: int) -> int:
    return a + b


@shared_task
def greet(name: str) -> str:
    """Return what only the application's configuration knows."""
    return f"{current_app.config['GREETING']}, {name}"


@shared_task
def fail() -> None:
    raise RuntimeError(f"in {current_app.name}")


def create_app() -> Flask:
    """Return the Flask application: views that start tasks and tell how far they are."""
    app = Flask("examples.celery_flask")
    url = os.environ.get("EXAMPLE_BROKER", "redis://localhost/0")
    app.config.from_mapping(
        GREETING="Hello",
        CELERY={
            "broker_url": url,
            "result_backend": os.environ.get("EXAMPLE_RESULTS", url),
            "broker_connection_retry_on_startup": True,
        },
    )
    celery_init_app(app)

    @app.post("/add")
    def start_add() -> dict[str, str]:
        result = add_together.delay(request.form.get("a", type=int), request.form.get("b", type=int))
        return {"result_id": result.id}

    @app.post("/greet/<name>")
    def start_greet(name: str) -> dict[str, str]:
        return {"result_id": greet.delay(name).id}

    @app.post("/fail")
    def start_fail() -> dict[str, str]:
        return {"result_id": fail.delay().id}

    @app.get("/result/<id>")
    def task_result(id: str) -> dict[str, Any]:
        result = AsyncResult(id)
        ready = result.ready()
        value = result.result if ready else None
        return {
            "ready": ready,
            "successful": result.successful() if ready else None,
            "value": repr(value) if isinstance(value, Exception) else value,
        }

    return app


flask_app = create_app()
celery_app = flask_app.extensions["celery"]
