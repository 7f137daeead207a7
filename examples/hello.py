"""The first application. Start a worker with `fastq -A examples.hello worker`, then call `add.delay(2, 3).get()`."""

from fastq import FastQ

app = FastQ("hello")


@app.task
def add(x: int, y: int) -> int:
    return x + y
