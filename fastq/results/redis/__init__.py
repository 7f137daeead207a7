"""Results in Redis, in Celery's keys: how they lie there, the caller's half and the worker's."""
