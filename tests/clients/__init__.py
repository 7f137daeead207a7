"""Clients in other languages against the worker: JavaScript packages from npm, PHP in the shape of celery-php."""
