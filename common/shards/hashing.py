"""xxh3_128 of files, texts and tensors, as hex."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import xxhash
from tqdm import tqdm

from common.shards import stream
from common.shards.headers import Tensor
from common.shards.stream import Task, Worker

BLOCK_BYTES = 8 << 20
_BLOCK = 1 << 18  # elements of a tensor


def text_hash(text: str) -> str:
    """text_hash("") -> '99aa06d3014798d86001c324468d497f'."""
    return xxhash.xxh3_128(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """The hash of a file's bytes, read in blocks."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


class _Hashes(dict):
    """{tensor: hash}; stands where a run that writes has its sink."""

    def finish_tensor(self, _shard: int, name: str, digest: str) -> None:
        self[name] = digest

    def abandon(self) -> None:
        """Nothing was written."""


def _tensor_hash(task: Task, worker: Worker, look: Callable) -> str:
    tensor, state = task.inputs[0], stream.new_hash()
    for start, stop in stream.blocks(tensor.numel, _BLOCK):
        bits = worker.read(tensor, start, stop)
        state.update(bits)
        look(tensor, bits)
    return state.hexdigest()


def tensor_hashes(tensors: list[Tensor], title: str, look: Callable = lambda _tensor, _bits: None) -> dict[str, str]:
    """{tensor: hash of its bytes} in the order given, by several threads, a block per thread in memory.

    look(tensor, bits) sees every block as it passes, the blocks of one tensor one after the other. Progress goes
    to stderr, in bytes, under `title`. Raises DataError if a file ends within a tensor.
    """
    found, lock, total = _Hashes(), threading.Lock(), sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, mininterval=0.2) as bar:

        def moved(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        tasks = [Task(tensor.name, (tensor,), (), 0) for tensor in tensors]
        stream.run(tasks, partial(_tensor_hash, look=look), found, moved, stream.worker_count())
    return {tensor.name: found[tensor.name] for tensor in tensors}
