"""What fastq will make of a Celery application, looked at before it runs."""
