"""xxh3_128 of files, texts and tensors, as hex."""

from collections.abc import Callable
from pathlib import Path

import xxhash

from common.shards.blocks import blocks
from common.shards.headers import Tensor
from common.shards.stream import Task, Worker, new_hash, progress, run, worker_count

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


def tensor_hashes(tensors: list[Tensor], title: str, look: Callable = lambda _tensor, _bits: None) -> dict[str, str]:
    """{tensor: hash of its bytes} in the order given, by several threads, a block per thread in memory.

    look(tensor, bits) sees every block as it passes, the blocks of one tensor one after the other. Progress is
    shown on stderr, in bytes, under `title`. Raises DataError if a file ends within a tensor.
    """

    def tensor_hash(task: Task, worker: Worker) -> str:
        state, reader = new_hash(), worker.reader(task.inputs[0])
        for span in blocks(reader.numel, _BLOCK):
            bits = reader.read(*span)
            state.update(bits)
            look(reader.tensor, bits)
        return state.hexdigest()

    tasks = [Task(tensor.name, (tensor,), (), 0) for tensor in tensors]
    with progress(title, sum(tensor.nbytes for tensor in tensors)) as moved:
        found = run(tasks, tensor_hash, moved, worker_count())
    return {tensor.name: found[tensor.name] for tensor in tensors}
