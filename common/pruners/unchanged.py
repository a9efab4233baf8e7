"""Tensors of the base that a vector does not change."""

from common.shards.blocks import blocks
from common.shards.stream import Task, Worker, new_hash, not_finite


def zero_tensor(task: Task, worker: Worker) -> list[dict]:
    """Write +0.0 to every output, of the dtype of its slot; the records have the hashes of what was read and written.

    task.inputs[0], the base's tensor, is read even so: its hash is what the next step knows the base by. (Where only
    vectors are read it is the first one's, and nobody asks for its hash.) Raises DataError if it is not all finite.
    """
    from common.pruners import kernels

    source, writers, digest = worker.reader(task.inputs[0]), worker.writers(task), new_hash()
    written = [new_hash() for _ in writers]
    for start, stop in blocks(source.numel, kernels.BLOCK):
        bits = source.read(start, stop)
        if not kernels.all_finite(bits, source.dtype):
            raise not_finite(source.tensor)
        digest.update(bits)
        for writer, state in zip(writers, written, strict=True):
            room = writer.room(start, stop)
            room[:] = 0
            state.update(room)
    return [{"base": digest.hexdigest(), "written": each.hexdigest(), "differs": 0} for each in written]
