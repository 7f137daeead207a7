"""Make the tables, start a worker and beat, send tasks, print what stands in the database afterwards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from examples.celery_worker import beat, broker, parse_options, worker, working_folder

APP = "examples.celery_django"
TIMEOUT_S = 30.0


def main() -> int:
    """Return the exit code."""
    import examples.celery_django

    options = parse_options(examples.celery_django.__doc__ or "")
    with working_folder() as folder, broker(options.broker, folder) as url:
        environment = set_up(folder, url)
        with worker(options.program, APP, folder, environment):
            show_orders()
            make_schedule()
            with beat(APP, folder, environment, "--max-interval", "1", "--pidfile", ""):
                show_reports()
        tear_down()
    return 0


def set_up(folder: Path, url: str) -> dict[str, str]:
    """Make the database and return the environment of the other processes."""
    environment = {
        "EXAMPLE_BROKER": url,
        "EXAMPLE_DATABASE": str(folder / "shop.sqlite3"),
        "DJANGO_SETTINGS_MODULE": f"{APP}.settings",
    }
    os.environ.update(environment)
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)
    return environment


def show_orders() -> None:
    """Order three things, one of them twice, and print the table of results."""
    from django_celery_results.models import TaskResult

    from examples.celery_django.tasks import order, turnover

    for article, pieces, cents in (("book", 2, 1500), ("lamp", 1, 4900), ("chair", 4, 8900)):
        print(f"ordered {article}: number {order.delay(article, pieces, cents).get(timeout=TIMEOUT_S)}")
    again = order.delay("book", 1, 1500)
    print("ordered book again:", type(again.get(timeout=TIMEOUT_S, propagate=False)).__name__)
    print("turnover:", turnover.delay().get(timeout=TIMEOUT_S))
    for row in TaskResult.objects.order_by("task_name", "status", "result"):
        print(f"result  {row.task_name.removeprefix(APP)}  {row.status}  {row.result}")


def make_schedule() -> None:
    """Schedule a report for each second, as one would in Django's admin."""
    from django_celery_beat.models import IntervalSchedule, PeriodicTask

    every_second, _ = IntervalSchedule.objects.get_or_create(every=1, period=IntervalSchedule.SECONDS)
    entry = PeriodicTask.objects.create(name="report", task=f"{APP}.tasks.report", interval=every_second)
    print("schedule:", entry)


def show_reports() -> None:
    """Wait until the schedule has had some reports written and print what they say."""
    from examples.celery_django.models import Report

    wait_until(lambda: Report.objects.count() >= 3)
    print("reports:", sorted(set(Report.objects.values_list("cents", flat=True))))


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no report by the schedule after {TIMEOUT_S} s")
        time.sleep(0.05)


def tear_down() -> None:
    """Close what this process opened."""
    from django.db import connections

    from examples.celery_django import celery_app

    connections.close_all()
    celery_app.close()


if __name__ == "__main__":
    sys.exit(main())
