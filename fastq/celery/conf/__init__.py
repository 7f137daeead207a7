"""A Celery application's configuration, and what becomes of each of its settings."""
