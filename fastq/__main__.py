"""``python -m fastq``: the same as the ``fastq`` command."""

from fastq.cli import main

main()
