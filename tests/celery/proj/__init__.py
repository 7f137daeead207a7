"""The Celery application of these tests, as a user would write one: `celery -A tests.celery.proj worker`."""

from tests.celery.proj.app import app

__all__ = ["app"]
