"""The bridge to Celery applications: the only part of fastq that imports celery and kombu. Nothing is loaded here."""
