"""A Django project with results and schedule in its database, under either worker.

    python -m examples.celery_django --with celery
    python -m examples.celery_django --with fastq

Both print the same. It is laid out as Django projects with Celery are: `celery.py` makes the application, which reads
the settings whose names begin with CELERY_, and finds the `tasks` module of each installed app; tasks are shared tasks.
Results go to the database by django-celery-results (`CELERY_RESULT_BACKEND = "django-db"`); the schedule comes from the
database by django-celery-beat, whose beat is Celery's: `celery -A examples.celery_django beat -S django`.

By hand: `celery -A examples.celery_django worker`, or the same with `fastq`. EXAMPLE_BROKER names the broker and
EXAMPLE_DATABASE the SQLite file; `run.py` sets both, makes the tables, and prints what the tasks did.
"""

from examples.celery_django.celery import app as celery_app

__all__ = ["celery_app"]
