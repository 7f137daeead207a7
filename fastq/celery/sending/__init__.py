"""Celery's publish path for producers, on fastq's connections: what a call becomes, and how it gets to the broker.

``sender`` is ``app.send_task`` anew, ``plan`` what it knows before a call, ``outlets`` are the connections. Whatever is
not plain is left to Celery's own code, and every error of the broker too: so it is raised, and tried again, as ever.
"""
