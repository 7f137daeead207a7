"""Start a worker, ask the web application for tasks, print what it answers."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from flask.testing import FlaskClient

from examples.celery_worker import broker, parse_options, worker, working_folder

TIMEOUT_S = 30.0


def main() -> int:
    import examples.celery_flask

    options = parse_options(examples.celery_flask.__doc__ or "")
    with working_folder() as folder, broker(options.broker, folder) as url:
        os.environ["EXAMPLE_BROKER"] = url
        app = examples.celery_flask.create_app()
        with (
            worker(options.program, "examples.celery_flask", folder, {"EXAMPLE_BROKER": url}),
            app.test_client() as web,
        ):
            show(web)
        app.extensions["celery"].close()
    return 0


def show(web: FlaskClient) -> None:
    """Start one task of each kind by the web and print the answers."""
    for path, form in (("/add", {"a": 2, "b": 3}), ("/greet/world", {}), ("/fail", {})):
        started = web.post(path, data=form).get_json()
        print(f"POST {path:12} ->", answer_for(web, started["result_id"]))


def answer_for(web: FlaskClient, result_id: str) -> Any:
    """Return what the web application says about a task when that is over."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        answer = web.get(f"/result/{result_id}").get_json()
        if answer["ready"]:
            return answer
        time.sleep(0.02)
    raise TimeoutError(f"task {result_id} was not over after {TIMEOUT_S} s")


if __name__ == "__main__":
    sys.exit(main())
