"""The main process of a worker that runs a Celery application."""
