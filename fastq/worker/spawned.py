"""A FastQ application in a spawned child: imported anew, and made ready as the main process's is before the fork."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from fastq.running.birth import ChildOptions
from fastq.running.child import ChildProcess
from fastq.worker.options import WorkerOptions
from fastq.worker.place import Origin, Place
from fastq.worker.process.log import child_logging, open_handler
from fastq.worker.program import FastQProgram


def make_child(place: Place, origin: Origin, options: WorkerOptions, child: ChildOptions) -> ChildProcess:
    """Return what runs in the child. ``options`` are the worker's, complete."""
    app = place.find()
    origin.lay_over(app, import_module)
    for name in options.include:
        import_module(name)
    program = FastQProgram(app)
    program.load(options, ())
    program.setup_logging(open_handler(options.logfile, options.hostname), options)
    made = program.child_main(replace(child, setup=child_logging(options, program.settings, child.calls)))
    made.prepare()
    return made
