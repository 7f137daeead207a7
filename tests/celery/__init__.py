"""One Celery application under two workers, `celery worker` and `fastq worker`; each test expects the same of both."""
