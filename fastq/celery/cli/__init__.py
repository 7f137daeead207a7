"""The command line and programs with a Celery application in hand."""
