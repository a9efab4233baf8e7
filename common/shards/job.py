"""One run of a script: claim the output, stream, publish."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from common.errors import DataError
from common.shards import publish, sink, stream
from common.shards.buffers import READ, WRITE
from common.shards.checkpoint import Checkpoint
from common.shards.layout import Output
from common.shards.places import check_disk, existing_parent
from common.shards.processes import Group, deal, group, wait_for_everyone
from common.shards.stream import SHELVES, Task


@dataclass(frozen=True)
class Job:
    """What a script has decided to do. `identity` tells its run from every other (script, parameters, inputs)."""

    title: str
    identity: dict
    outputs: list[Output]
    tasks: list[Task]
    process: Callable  # (task, worker) -> a record for each output
    complete: Callable  # (output, records): write what goes beside the weights to output.part
    passes: int = 1  # how often the inputs are read, at least

    def moves(self, task: Task) -> int:
        """Bytes that a task reads and writes; what it reads in several passes counts once."""
        return sum(t.nbytes for t in task.inputs) + sum(slot.nbytes for slot in task.slots)


def input_files(checkpoints: list[Checkpoint]) -> dict[str, list[int]]:
    """{file: [bytes, time of last change in ns]} of everything that decides what is written."""
    here = [checkpoint for checkpoint in checkpoints if not checkpoint.is_remote]
    files = {tensor.path for checkpoint in here for tensor in checkpoint.tensors.values()}
    beside = (checkpoint.path / name for checkpoint in checkpoints for name in ("config.json", "task_vector.json"))
    files |= {path for path in beside if path.is_file()}
    stats = {str(path): os.stat(path) for path in sorted(files)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def describe(job: Job, inputs: list[Checkpoint]) -> str:
    """The plan as --dry_run prints it."""
    lines = [
        f"reads   {c.nbytes / 1e9:8.3f} GB  {c.label} ({len(c.tensors)} tensors{', to be downloaded' * c.is_remote})"
        for c in inputs
    ]
    if job.passes > 1:
        lines.append(f"        vectors are read {job.passes} times (see --help)")
    for output in job.outputs:
        lines.append(f"writes  {output.nbytes / 1e9:8.3f} GB  {output.final} ({len(output.shards)} files)")
        if output.final.exists():
            lines.append(f"exists             {output.final}: refused without --overwrite")
    total = sum(output.nbytes for output in job.outputs)
    workers = stream.worker_count()
    lines.append(f"disk    {total / 1e9:8.3f} GB  to be free; there are: {_free(job)}")
    lines.append(f"memory  {_memory(job, workers) / 1e9:8.3f} GB  at most ({workers} threads)")
    return "\n".join(lines)


def _memory(job: Job, workers: int) -> int:
    """Bytes, a little more than measured: libraries, a request for every file per thread, what is read again."""
    streams = [READ * len(task.inputs) + WRITE * len(task.slots) for task in job.tasks]
    return 250 * 10**6 + workers * max(streams, default=0) + (SHELVES if job.passes > 1 else 0)


def _free(job: Job) -> str:
    """ "12.345 GB under models" for every place that is written to."""
    places = sorted({existing_parent(output.final.absolute().parent) for output in job.outputs})
    return ", ".join(f"{shutil.disk_usage(place).free / 1e9:.3f} GB under {place}" for place in places)


def execute(job: Job, overwrite: bool) -> bool:
    """Do the job, or go on with it where an earlier run of the same command stopped.

    Returns whether this process is the one that published. Raises DataError for bad data (what was written is
    removed: going on would meet the same data again); whatever else stops it leaves whole shards in
    <save_path>.part for the next run.
    """
    processes = group()
    holds = _claim(job, overwrite) if processes.is_main else []
    wait_for_everyone(processes)  # until the output is claimed
    whole = publish.whole_shards([output for output in job.outputs if output.part.is_dir()], job.outputs)
    wait_for_everyone(processes)  # until all have seen what is there, before anyone adds to it or publishes
    try:
        _stream(job, processes, whole)
        if processes.is_main:
            publish.publish(job.outputs, job.complete)
    except DataError:
        if processes.is_main:
            publish.discard(job.outputs)
        raise
    finally:
        for descriptor in holds:
            os.close(descriptor)
    return processes.is_main


def _claim(job: Job, overwrite: bool) -> list[int]:
    """Lock every output that this run has not published yet, and check that there is room for the rest of it."""
    waiting = publish.unpublished(job.outputs, job.identity)
    holds = []
    try:
        for output in waiting:
            holds.append(publish.claim(output, job.identity, overwrite))
        whole = publish.whole_shards(waiting, job.outputs)
        if len(waiting) < len(job.outputs) and len(whole) < len(job.outputs[0].shards):
            raise DataError(
                f"{waiting[0].part}: incomplete, though the other outputs of this run are there; "
                "delete those, or start afresh with --overwrite"
            )
        check_disk({o.final: sum(s.nbytes for i, s in enumerate(o.shards) if i not in whole) for o in waiting})
    except DataError:
        for output, descriptor in zip(waiting, holds, strict=False):
            publish.release(output, descriptor)
        raise
    return holds


def _stream(job: Job, processes: Group, whole: set[int]) -> None:
    """Process this process's shards; the main one then waits until the others' are whole too."""
    mine = deal([shard.nbytes for shard in job.outputs[0].shards], processes)
    tasks = [task for task in job.tasks if task.shard in mine - whole]
    bar = tqdm(
        total=sum(job.moves(task) for task in job.tasks),
        initial=sum(job.moves(task) for task in job.tasks if task.shard in whole),
        unit="B",
        unit_scale=True,
        desc=job.title,
        disable=not processes.is_main,
        mininterval=0.2,
    )
    lock = threading.Lock()

    def moved(nbytes: int) -> None:
        with lock:
            bar.update(nbytes)

    with bar:
        if tasks:
            stream.run(tasks, job.process, sink.Sink(job.outputs), moved, stream.worker_count())
        if processes.is_main:
            _wait_for_others(job, whole | mine, bar)


def _wait_for_others(job: Job, seen: set[int], bar: tqdm) -> None:
    while len(seen) < len(job.outputs[0].shards):
        new = publish.whole_shards(job.outputs, job.outputs) - seen
        bar.update(sum(job.moves(task) for task in job.tasks if task.shard in new))
        seen = seen | new
        time.sleep(0.2)
