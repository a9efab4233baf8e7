"""One execution of a script: claim the outputs or resume them, stream, publish.

with begin(job, overwrite) as running:          # locks the outputs, finds what an earlier attempt completed
    running.stream(do)                          # do(task, worker) -> a record for each output
    for number, part, records in running.whole():
        ...                                     # add config, tokenizer, report to the directory `part`
                                                # leaving the block renames every output to its final name
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.shards import publish, stream
from common.shards.buffers import HELD_FOR, READ, WRITE
from common.shards.checkpoint import Checkpoint
from common.shards.layout import Output
from common.shards.places import check_disk, existing_parent, is_empty, refuse_existing, whole_path
from common.shards.processes import Group, deal, group, wait_for_everyone
from common.shards.remote import fetch, to_download
from common.shards.sink import Sink
from common.shards.stream import SHELVES, Task


@dataclass(frozen=True)
class Job:
    """What a script has decided to do. `identity` tells it from every other job (script, parameters, inputs)."""

    title: str
    identity: dict
    outputs: list[Output]
    tasks: list[Task]
    passes: int = 1  # how often the inputs are read, at least

    @property
    def shard_bytes(self) -> list[int]:
        """The size of each shard of one output: all outputs are cut alike."""
        return [shard.nbytes for shard in self.outputs[0].shards]


def identity(script: str, parameters: dict, inputs: list[Checkpoint], outputs: list[Path]) -> dict:
    """What tells a job from every other: JSON that decides every byte it writes, and where it writes them.

    What else decides bytes (an adapter's settings, tokens that two vocabularies share) belongs into `parameters`.
    """
    places = [whole_path(path) for path in outputs]
    return {"script": script, "parameters": parameters | {"outputs": places}, "inputs": input_files(inputs)}


def input_files(checkpoints: list[Checkpoint]) -> dict[str, list[int]]:
    """{file: [bytes, time of last change in ns]} of everything that decides what is written."""
    here = [checkpoint for checkpoint in checkpoints if not checkpoint.is_remote]
    files = {tensor.path for checkpoint in here for tensor in checkpoint.tensors.values()}
    beside = (checkpoint.path / name for checkpoint in checkpoints for name in ("config.json", "task_vector.json"))
    files |= {path for path in beside if path.is_file()}
    stats = {whole_path(path): os.stat(path) for path in sorted(files)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


# --- what --dry_run says --------------------------------------------------------------------------


def describe(job: Job, inputs: list[Checkpoint]) -> str:
    """The plan as --dry_run prints it."""
    lines = [
        f"reads   {c.nbytes / 1e9:8.3f} GB  {c.label} ({len(c.tensors)} tensors{', to be downloaded' * c.is_remote})"
        for c in inputs
    ]
    if job.passes > 1:
        lines.append(f"        vectors are read at least {job.passes} times (see --help)")
    for output in job.outputs:
        lines.append(f"writes  {output.nbytes / 1e9:8.3f} GB  {output.final} ({len(output.shards)} files)")
        if output.final.exists() and not is_empty(output.final):
            lines.append(f"exists             {output.final}: refused without --overwrite")
    lines += [f"disk    {nbytes / 1e9:8.3f} GB  for the download" for nbytes in to_download(inputs).values()]
    total = sum(output.nbytes for output in job.outputs)
    workers = stream.worker_count()
    lines.append(f"disk    {total / 1e9:8.3f} GB  needed; free: {_free(job)}")
    lines.append(f"memory  {memory_needed(job, workers) / 1e9:8.3f} GB  at most ({workers} threads)")
    return "\n".join(lines)


def memory_needed(job: Job, workers: int) -> int:
    """Bytes, a little more than measured: libraries, requests for every file per thread, what is read again."""
    streams = [HELD_FOR * (READ * len(task.inputs) + WRITE * len(task.slots)) for task in job.tasks]
    return 250 * 10**6 + workers * max(streams, default=0) + (SHELVES if job.passes > 1 else 0)


def _free(job: Job) -> str:
    """ "12.345 GB under models" for every place that is written to."""
    places = sorted({existing_parent(output.part.parent) for output in job.outputs})
    return ", ".join(f"{shutil.disk_usage(place).free / 1e9:.3f} GB under {place}" for place in places)


# --- weights that are still on the Hub ------------------------------------------------------------


def downloaded(job: Job, inputs: list[Checkpoint], overwrite: bool) -> list[Checkpoint]:
    """The inputs, in order, with all of their weights on this machine; the job is to be planned anew with them.

    Raises DataError before the first weight is downloaded for all that begin() would refuse of places and disk. A job
    that stopped halfway has its inputs in the cache, so what is found under its names now is another job's.
    """
    if any(checkpoint.is_remote for checkpoint in inputs):
        for output in job.outputs:
            refuse_existing(output.final, overwrite)
            publish.refuse_another_job(output.part, job.identity, overwrite)
        check_disk(to_download(inputs) | {output.final: output.nbytes for output in job.outputs})
    return [fetch(checkpoint) for checkpoint in inputs]


# --- the job at work ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A job whose outputs are claimed; `done` are the numbers of the shards that an earlier attempt completed."""

    job: Job
    processes: Group
    done: set[int]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that publishes, and says so."""
        return self.processes.is_main

    def stream(self, do: Callable[[Task, stream.Worker], list[dict]]) -> None:
        """Do this process's share of the tasks; the main process then waits for the others' shards."""
        mine = deal(self.job.shard_bytes, self.processes)
        tasks = [task for task in self.job.tasks if task.shard in mine - self.done]
        total = sum(task.nbytes for task in self.job.tasks)
        with stream.progress(self.job.title, total, self._nbytes(self.done), self.is_main) as moved:
            if tasks:
                sink = Sink(self.job.outputs)
                try:
                    stream.run(tasks, do, moved, stream.worker_count(), sink)
                finally:
                    sink.abandon()
            if self.is_main:
                self._wait_for_others(self.done | mine, moved)

    def _nbytes(self, shards: set[int]) -> int:
        return sum(task.nbytes for task in self.job.tasks if task.shard in shards)

    def _wait_for_others(self, seen: set[int], moved: Callable[[int], None]) -> None:
        while len(seen) < len(self.job.shard_bytes):
            new = publish.whole_shards(self.job.outputs, self.job.outputs) - seen
            moved(self._nbytes(new))
            seen = seen | new
            time.sleep(0.2)

    def whole(self) -> list[tuple[int, Path, dict[str, dict]]]:
        """(number, directory, {tensor: record}) of each output whose weights are complete and that is to be published;
        nothing but the weights is in the directory.

        Empty on the processes that do not publish.
        """
        every = enumerate(self.job.outputs) if self.is_main else ()
        waiting = [(i, output) for i, output in every if output.part.is_dir()]
        for _, output in waiting:
            publish.remove_additions(output)
        return [(i, output.part, publish.records(output)) for i, output in waiting]


@contextmanager
def begin(job: Job, overwrite: bool) -> Iterator[Running]:
    """Claim the outputs, or resume where an earlier attempt of the same job stopped; on leaving, publish them.

    Raises DataError for bad data (what was written is deleted, at the next start if a process met it that is not the
    main one: resuming would meet the same data again). Anything else that stops the job leaves complete shards in
    <save_path>.part for the next attempt.
    """
    processes = group()
    holds = _claim(job, overwrite) if processes.is_main else []
    try:
        wait_for_everyone(processes)  # until the outputs are claimed
        done = publish.whole_shards([output for output in job.outputs if output.part.is_dir()], job.outputs)
        wait_for_everyone(processes)  # until all have seen what is there, before anyone adds to it or publishes
        yield Running(job, processes, done)
        if processes.is_main:
            publish.publish(job.outputs, overwrite)
    except DataError:
        if processes.is_main:
            publish.discard(job.outputs)
        else:
            publish.mark_refused(job.outputs)
        raise
    finally:
        for descriptor in holds:
            os.close(descriptor)


def _claim(job: Job, overwrite: bool) -> list[int]:
    """Lock every output that this job has not published yet, and check that there is room for the rest of it.

    What it has published is made again with the rest where that is lost: a shard is written to all outputs at once.
    """
    waiting = publish.unpublished(job.outputs, job.identity)
    holds = []
    try:
        for output in waiting:
            holds.append(publish.claim(output, job.identity, overwrite))
        whole = publish.whole_shards(waiting, job.outputs)
        if len(waiting) < len(job.outputs) and len(whole) < len(job.outputs[0].shards):
            if not overwrite:
                raise DataError(
                    f"{waiting[0].part}: incomplete, though the other outputs of this job are there; "
                    "delete those, or start afresh with --overwrite"
                )
            published = [output for output in job.outputs if output not in waiting]
            for output in published:
                holds.append(publish.claim(output, job.identity, overwrite))
                waiting = [*waiting, output]
            publish.forget(published)  # else the next start, if this one is stopped, would count them as published
            whole = publish.whole_shards(waiting, job.outputs)
        check_disk({o.final: sum(s.nbytes for i, s in enumerate(o.shards) if i not in whole) for o in waiting})
    except DataError:
        for output, descriptor in zip(waiting, holds, strict=False):
            publish.release(output, descriptor)
        raise
    return holds
