"""Tensors through worker threads: read, compute, write.

Each worker takes the next tensor and moves it block by block: read into a buffer it reuses, compute while the block is
in its core's cache, write to the block's place in the output. Other threads read ahead and write behind for it, so a
worker for each core is enough. Memory is a few blocks per worker, regardless of the size of model, shard or tensor.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from common.errors import DataError
from common.shards.blocks import Reader, Writer, blocks
from common.shards.buffers import InputBuffer, OutputBuffer, Shelf
from common.shards.direct import File
from common.shards.headers import Tensor
from common.shards.layout import Slot
from common.shards.systems import cores

_COPY_BLOCK = 1 << 18  # elements
_TELL = 16 << 20  # bytes between two reports of a thread to the progress bar
_FILES = 4  # requests that are under way for a worker at once: most tasks read two or three files and write one
SHELVES = 512 << 20  # bytes that all workers together keep from one pass over a tensor to the next


@dataclass(frozen=True)
class Task:
    """One output tensor: where its inputs are, and its slot in each output (all in shard number `shard`)."""

    name: str
    inputs: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    shard: int

    @property
    def nbytes(self) -> int:
        """Bytes that it reads and writes; what it reads in several passes counts once."""
        return sum(tensor.nbytes for tensor in self.inputs) + sum(slot.nbytes for slot in self.slots)


class Halted(Exception):
    """Another worker failed, or the job was interrupted: stop at the next block."""


class Worker:
    """What one thread holds from task to task: open inputs, buffers, the way to the sink (None: nothing is written)."""

    def __init__(self, sink, halt: threading.Event, moved: Callable[[int], None], shelf: Shelf, io: Executor):
        self._sink, self._halt, self._moved, self._shelf, self._io = sink, halt, moved, shelf, io
        self._files: dict[Path, File] = {}
        self._buffers: list[InputBuffer] = []
        self._out_buffers: list[OutputBuffer] = []
        self._readers, self._writers = 0, []
        self._passed = 0  # bytes that the progress bar has not been told of

    def _advance(self, nbytes: int) -> None:
        if self._halt.is_set():
            raise Halted
        self._passed += nbytes
        if self._passed >= _TELL:  # four calls a block would cost a core a twentieth of its time
            self._tell()

    def _tell(self) -> None:
        self._moved(self._passed)
        self._passed = 0

    def reader(self, tensor: Tensor, again: bool = False) -> Reader:
        """A reader of one tensor, for the task at hand. With `again` it will be read in several passes."""
        if tensor.path not in self._files:
            self._files[tensor.path] = File(tensor.path, os.O_RDONLY)
        # Each reader of a task has a buffer of its own: two that are read in turn would overwrite each other's block.
        if self._readers == len(self._buffers):
            self._buffers.append(InputBuffer(self._io))
        buffer, self._readers = self._buffers[self._readers], self._readers + 1
        return Reader(tensor, self._files[tensor.path], buffer, self._advance, self._shelf if again else None)

    def writers(self, task: Task) -> list[Writer]:
        """A writer for the task's slot in each output."""
        self._out_buffers += [OutputBuffer(self._io) for _ in task.slots[len(self._out_buffers) :]]
        self._writers = self._sink.writers(task, self._out_buffers, self._advance)
        return self._writers

    def room(self, nbytes: int) -> np.ndarray | None:
        """uint8 [nbytes] for what the task at hand keeps from one pass to the next; None where there is no room."""
        return self._shelf.room(nbytes)

    def finish(self, task: Task, records) -> None:
        """Write what is left of a task's tensor, and hand its records to the sink."""
        for writer in self._writers:
            writer.flush()
        self._tell()
        self._shelf.clear()
        self._readers, self._writers = 0, []
        if self._sink:
            self._sink.finish_tensor(task.shard, task.name, records)

    def close(self) -> None:
        """Close the inputs; nothing of this thread is under way any more when this returns."""
        for buffer in self._buffers + self._out_buffers:
            buffer.wait()
        for file in self._files.values():
            file.close()


def new_hash():
    """A hasher for tensor bytes, xxh3_128; digests are written as hex."""
    return xxhash.xxh3_128()


def not_finite(tensor: Tensor) -> DataError:
    """What to raise for a tensor that holds NaN or infinity."""
    return DataError(
        f"tensor {tensor.name!r} in {tensor.path}: holds NaN or infinity; take an undamaged copy of the model"
    )


def copy_tensor(task: Task, worker: Worker) -> list[dict]:
    """Carry a tensor over, byte for byte, to every output."""
    source, writers, digest = worker.reader(task.inputs[0]), worker.writers(task), new_hash()
    for start, stop in blocks(source.numel, _COPY_BLOCK):
        bits = source.read(start, stop)
        digest.update(bits)
        for writer in writers:
            writer.room(start, stop)[:] = bits
    return [{"base": digest.hexdigest(), "written": digest.hexdigest()} for _ in task.slots]


def same_bytes(worker: Worker, left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of equal shape hold the same bytes, and are of one dtype."""
    if left.dtype != right.dtype:
        return False
    mine, other = worker.reader(left), worker.reader(right)
    return all(np.array_equal(mine.read(*span), other.read(*span)) for span in blocks(left.numel, _COPY_BLOCK))


@contextmanager
def progress(title: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr; yields moved(nbytes), which any thread may call."""
    lock = threading.Lock()  # tqdm counts without one of its own
    bar = {"unit": "B", "unit_scale": True, "mininterval": 0.2, "disable": not shown}
    with tqdm(total=total, initial=done, desc=title, **bar) as shown_bar:

        def moved(nbytes: int) -> None:
            with lock:
                shown_bar.update(nbytes)

        yield moved


def run(tasks: list[Task], do: Callable[[Task, Worker], list], moved: Callable, workers: int, sink=None) -> dict:
    """do(task, worker) for every task -> {task's name: what it returned}; the sink, if there is one, gets the same.

    Shard by shard, the largest tensor first, so that no worker is left alone with a large one at the end. The first
    failure stops all workers at their next block and is raised here, when none of them is at work any more.
    """
    halt, idle, busy, found = threading.Event(), threading.Condition(), set(), {}
    pending = iter(sorted(tasks, key=lambda task: (task.shard, -task.inputs[0].nbytes)))

    def next_task() -> Task | None:
        with idle:
            task = None if halt.is_set() else next(pending, None)
            if task:
                busy.add(threading.get_ident())
            return task

    def work() -> None:
        worker = Worker(sink, halt, moved, Shelf(SHELVES // workers), io)
        try:
            while task := next_task():
                found[task.name] = do(task, worker)
                worker.finish(task, found[task.name])
        except Halted:
            pass
        except BaseException:
            halt.set()
            raise
        finally:
            worker.close()
            with idle:
                busy.discard(threading.get_ident())
                idle.notify_all()

    with ThreadPoolExecutor(_FILES * workers) as io, ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            wait(futures)
        finally:  # an interrupt may arrive at any moment, even while a thread is being started
            halt.set()
            with idle:
                idle.wait_for(lambda: not busy)
    for future in futures:
        future.result()
    return found


def worker_count() -> int:
    """Threads that compute: one for each core this process may run on, at most 8; more would only take turns."""
    return min(cores(), 8)
