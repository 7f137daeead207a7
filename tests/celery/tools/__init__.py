"""Tools that people attach to Celery, each with the worker under it: the same outcome under Celery and under fastq."""
