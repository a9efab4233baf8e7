"""Blocks of tensors through worker threads: read, compute, write.

Each worker takes the next tensor and moves it block by block: read into a buffer it reuses,
compute while the block is in its core's cache, write to the block's place in the output. While one worker waits
for the disk the others compute. Memory is a few blocks per worker, whatever the size of model, shard or tensor.
"""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from common.errors import DataError
from common.shards.buffers import Shelf, Stage, Window
from common.shards.direct import File
from common.shards.headers import DTYPE_BYTES, Tensor
from common.shards.layout import Slot
from common.shards.sink import Sink
from common.shards.systems import cores

_COPY_BLOCK = 1 << 18  # elements
SHELVES = 512 << 20  # bytes that all workers together keep of what a task reads from disk more than once
_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Task:
    """One output tensor: where its inputs lie, and its slot in each output (all in shard number `shard`)."""

    name: str
    inputs: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    shard: int


class Halted(Exception):
    """Another worker failed, or the run was interrupted: stop at the next block."""


class Worker:
    """What one thread holds: its inputs, the parts of them and of the outputs in memory, the way to the sink."""

    def __init__(self, sink: Sink, halt: threading.Event, moved: Callable[[int], None], shelf: Shelf):
        self._sink, self._halt, self.moved, self._shelf = sink, halt, moved, shelf
        self._inputs: dict[Path, File] = {}
        self._windows: dict[int, Window] = defaultdict(Window)
        self._stages: dict[int, Stage] = defaultdict(Stage)

    def _input(self, path: Path) -> File:
        if path not in self._inputs:
            self._inputs[path] = File(path, os.O_RDONLY)
        return self._inputs[path]

    def read(self, tensor: Tensor, start: int, stop: int, window: int = 0, moves: bool = True) -> np.ndarray:
        """Bits of elements start:stop of a tensor, valid until the next read through window number `window`.

        Moves the progress bar, unless the caller does.
        """
        bits = self._bits(tensor, start, stop, tensor.numel, window)
        if moves:
            self.moved(bits.nbytes)
        return bits

    def peek(self, tensor: Tensor, start: int, stop: int, window: int = 0) -> np.ndarray:
        """The same, for a small part out of the order: nothing is read ahead, and the progress bar does not move."""
        return self._bits(tensor, start, stop, stop, window)

    def _bits(self, tensor: Tensor, start: int, stop: int, last: int, window: int) -> np.ndarray:
        """Elements start:stop, of those up to `last` that will be asked for."""
        if self._halt.is_set():
            raise Halted
        size = DTYPE_BYTES[tensor.dtype]
        begin, end, limit = (tensor.offset + number * size for number in (start, stop, last))
        data = self._windows[window].read(self._input(tensor.path), begin, end, limit)
        if data is None:
            raise DataError(
                f"tensor {tensor.name!r} in {tensor.path}: the file ends within it; it was cut short while it was read"
            )
        if begin % size:  # other writers than ours need not align a tensor to its elements
            data = data.copy()
        return data.view(_NUMPY[size])

    def read_again(self, tensor: Tensor, start: int, stop: int, window: int = 0) -> np.ndarray:
        """The same, for what a task reads in several passes: from memory where it was kept since the last one.

        The caller moves the progress bar, once for all passes: how many there are depends on the data.
        """
        kept = self._shelf.get((tensor, start, stop))
        if kept is not None:
            return kept.view(_NUMPY[DTYPE_BYTES[tensor.dtype]])
        data = self.read(tensor, start, stop, window, False)
        if self._windows[window].is_from_disk:
            self._shelf.keep((tensor, start, stop), data.view(np.uint8))
        return data

    def room(self, task: Task, output: int, start: int, stop: int) -> np.ndarray:
        """Room for elements start:stop of a task's tensor in output number `output`, to be filled in order, without gaps.

        Valid until the next room for this output; goes to disk some time before the task is over.
        """
        slot = task.slots[output]
        size = DTYPE_BYTES[slot.dtype]
        file = self._sink.files(task.shard)[output]
        data = self._stages[output].room(file, slot.offset + start * size, (stop - start) * size)
        self.moved(data.nbytes)
        return data.view(_NUMPY[size])

    def finish(self, task: Task, records: list[dict]) -> None:
        """Write what is left of a task's tensor, and hand its records to the sink."""
        for stage in self._stages.values():
            stage.flush()
        self._shelf.clear()
        self._sink.finish_tensor(task.shard, task.name, records)

    def close(self) -> None:
        """Close the inputs."""
        for file in self._inputs.values():
            file.close()


def blocks(numel: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks: blocks(5, 2) -> (0, 2), (2, 4), (4, 5)."""
    return ((at, min(at + block, numel)) for at in range(0, numel, block))


def new_hash():
    """A hasher for tensor bytes, xxh3_128; digests are written as hex."""
    return xxhash.xxh3_128()


def not_finite(tensor: Tensor) -> DataError:
    """What to raise for a tensor that holds NaN or infinity."""
    return DataError(f"tensor {tensor.name!r} in {tensor.path}: holds NaN or infinity; take a sound copy of the model")


def copy_tensor(task: Task, worker: Worker) -> list[dict]:
    """Carry a tensor over, byte for byte, to every output."""
    source, digest = task.inputs[0], new_hash()
    for start, stop in blocks(source.numel, _COPY_BLOCK):
        bits = worker.read(source, start, stop)
        digest.update(bits)
        for output in range(len(task.slots)):
            worker.room(task, output, start, stop)[:] = bits
    return [{"base": digest.hexdigest(), "written": digest.hexdigest()} for _ in task.slots]


def same_bytes(worker: Worker, left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of equal dtype and shape hold the same bytes."""
    spans = blocks(left.numel, _COPY_BLOCK)
    return left.dtype == right.dtype and all(
        np.array_equal(worker.read(left, *span, 0), worker.read(right, *span, 1)) for span in spans
    )


def run(
    tasks: list[Task],
    process: Callable[[Task, Worker], list[dict]],
    sink: Sink,
    moved: Callable,
    workers: int,
) -> None:
    """process(task, worker) -> a record for each output, for every task; whole shards go to the sink.

    Shard by shard, the largest tensor first, so that no worker is left alone with a large one at the end. The first
    failure stops all workers at their next block and is raised here.
    """
    halt, idle, busy = threading.Event(), threading.Condition(), set()
    pending = iter(sorted(tasks, key=lambda task: (task.shard, -task.inputs[0].nbytes)))

    def next_task() -> Task | None:
        with idle:
            task = None if halt.is_set() else next(pending, None)
            if task:
                busy.add(threading.get_ident())
            return task

    def work() -> None:
        worker = Worker(sink, halt, moved, Shelf(SHELVES // workers))
        try:
            while task := next_task():
                worker.finish(task, process(task, worker))
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

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            wait(futures)
        finally:  # an interrupt may come at any moment, while a thread is being started, too
            halt.set()
            with idle:
                idle.wait_for(lambda: not busy)
            sink.abandon()
    for future in futures:
        future.result()


def worker_count() -> int:
    """Threads to use: two more than the cores this process may run on, for when some wait for the disk; at most 10."""
    return min(cores(), 8) + 2
