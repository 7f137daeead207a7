"""Running a Celery application's calls, in the child."""
