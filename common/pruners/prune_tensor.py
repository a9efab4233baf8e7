"""One tensor of all vectors: read, prune, add, count."""

from common.errors import DataError
from common.pruners.pruning import Pruning, in_passes, masks_by_block
from common.pruners.tally import new_counts, tallies, to_record
from common.shards.headers import Tensor
from common.shards.stream import Task, Worker, new_hash, not_finite


def prune_tensor(task: Task, worker: Worker, pruning: Pruning, mask_name: str, save_format: str, engine) -> list[dict]:
    """Prune one tensor of every vector; each record has hashes of base, vector and result, and the counts."""
    base, vectors = (task.inputs[0], task.inputs[1:]) if save_format == "model" else (None, task.inputs)
    dtypes, counts = [vector.dtype for vector in vectors], new_counts(len(vectors))
    base_hash = new_hash()
    vector_hashes, written_hashes = [new_hash() for _ in vectors], [new_hash() for _ in vectors]
    again = in_passes(pruning, engine.BLOCK)
    raw, take = {}, worker.read_again if again else worker.read

    def read(j: int, start: int, stop: int):
        raw[j] = take(vectors[j], start, stop, j)
        return engine.load(raw[j])

    def peek(j: int, start: int, stop: int):
        return engine.load(worker.peek(vectors[j], start, stop, j))

    blocks = masks_by_block(pruning, mask_name, dtypes, vectors[0].numel, read, engine, peek=peek)
    for start, stop, bits, masks in blocks:
        below = None
        if base:
            below = worker.read(base, start, stop, len(vectors))
            base_hash.update(below)
            below = engine.load(below)
        for j, vector in enumerate(vectors):
            vector_hashes[j].update(raw[j])
            if again:
                worker.moved(raw[j].nbytes)
            if not engine.tally(bits[j], vector.dtype, masks, j, start, pruning.m, counts):
                raise not_finite(vector)
            out, kept = worker.room(task, j, start, stop), (bits[j], vector.dtype, masks[j], pruning.scale)
            finite = engine.add_kept(out, below, base.dtype, *kept) if base else engine.keep_vector(out, *kept)
            if not finite:
                refuse_result(vector, base, below, engine)
            written_hashes[j].update(out)
    return [
        {
            "base": base_hash.hexdigest(),
            "vector": vector_hashes[j].hexdigest(),
            "written": written_hashes[j].hexdigest(),
            "tally": to_record(tally),
        }
        for j, tally in enumerate(tallies(counts, vectors[0].numel))
    ]


def refuse_result(vector: Tensor, base: Tensor | None, below, engine) -> None:
    """Raise DataError for a result that is not finite: the base is not, or the sum is too large."""
    if base and not engine.all_finite(below, base.dtype):
        raise not_finite(base)
    raise DataError(
        f"tensor {vector.name!r} of {vector.path.parent}: a result is beyond the largest {(base or vector).dtype}; "
        "use base and vectors in bfloat16 or float32, or no --rescale"
    )
