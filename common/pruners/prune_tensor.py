"""One tensor of all vectors: read, prune, add, count."""

from common.errors import DataError
from common.pruners.masks import Masks
from common.pruners.pruning import Pruning
from common.pruners.tally import new_counts, tallies, to_record
from common.shards.headers import DTYPE_NAMES, Tensor
from common.shards.stream import Task, Worker, new_hash, not_finite


def prune_tensor(task: Task, worker: Worker, pruning: Pruning, mask_name: str, engine) -> list[dict]:
    """Prune one tensor of every vector; each record has hashes of base, vector and result, and the counts.

    The task's inputs are the vectors, with the base before them where the output is base + pruned vector.
    """
    count = len(task.slots)
    vectors, writers = task.inputs[-count:], worker.writers(task)
    dtypes, numel = [vector.dtype for vector in vectors], vectors[0].numel
    masks, counts = Masks([pruning] * count, mask_name, dtypes, numel, engine), new_counts(count)
    readers = [worker.reader(vector, again=masks.in_passes) for vector in vectors]
    base = worker.reader(task.inputs[0]) if len(task.inputs) > count else None
    hashes = [(new_hash(), new_hash()) for _ in vectors]  # of each vector, of each result
    base_hash = new_hash()
    if masks.in_passes:
        masks.find_thresholds(
            masks.scanning(lambda j, start, stop: engine.load(readers[j].read(start, stop))),
            lambda j, start, stop: engine.load(readers[j].peek(start, stop)),
        )
    for start, stop in masks.blocks():
        raw = [reader.read(start, stop) for reader in readers]
        below = base.read(start, stop) if base else None
        bits = [engine.load(each) for each in raw]
        kept = masks.of(start, bits)
        if base:
            base_hash.update(below)
            below = engine.load(below)
        for j, (vector_hash, written_hash) in enumerate(hashes):
            vector_hash.update(raw[j])
            if not engine.tally(bits[j], dtypes[j], kept, j, start, pruning.m, counts):
                raise not_finite(vectors[j])
            out, added = writers[j].room(start, stop), (bits[j], dtypes[j], kept[j], pruning.scale)
            finite = engine.add_kept(out, below, base.dtype, *added) if base else engine.keep_vector(out, *added)
            if not finite:
                refuse_result(vectors[j], base and base.tensor, below, engine)
            written_hash.update(out)
    return [
        {
            "base": base_hash.hexdigest(),
            "vector": vector_hash.hexdigest(),
            "written": written_hash.hexdigest(),
            "tally": to_record(tally),
        }
        for (vector_hash, written_hash), tally in zip(hashes, tallies(counts, numel), strict=True)
    ]


def refuse_result(vector: Tensor, base: Tensor | None, below, engine) -> None:
    """Raise DataError for a result that is not finite: the base is not, or the sum is too large."""
    if base and not engine.all_finite(below, base.dtype):
        raise not_finite(base)
    raise DataError(
        f"tensor {vector.name!r} of {vector.path.parent}: a result is beyond the largest "
        f"{DTYPE_NAMES[(base or vector).dtype]}; use base and vectors in bfloat16 or float32, or no --rescale"
    )
