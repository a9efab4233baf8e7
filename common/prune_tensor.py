"""One tensor of all vectors: read, prune, add, count."""

from dataclasses import asdict

from common.errors import DataError
from common.headers import Tensor
from common.pruners import Pruning, masks_by_block
from common.report import Tally
from common.stream import Task, Worker, new_hash, refuse_not_finite


class Overlaps:
    """Counts of one tensor for all vectors, block by block."""

    def __init__(self, pruning: Pruning, dtypes: list[str], numel: int, engine):
        self._pruning, self._dtypes, self._engine = pruning, dtypes, engine
        count = len(dtypes)
        self.tallies = [Tally(numel=numel, both=[0] * count, either=[0] * count) for _ in dtypes]

    def take(self, start: int, vectors: list, masks: list) -> None:
        """Count one block."""
        engine, kept = self._engine, [self._engine.count(mask) for mask in masks]
        for j, tally in enumerate(self.tallies):
            energies = engine.energy(vectors[j], self._dtypes[j], masks[j])
            tally.kept += kept[j]
            tally.energy_kept += energies[0]
            tally.energy += energies[1]
            tally.runs = engine.tally_runs(masks[j], start, self._pruning.m, tally.runs)
            for i in range(j):
                both = engine.count(masks[i] & masks[j])
                for a, b in ((i, j), (j, i)):
                    self.tallies[a].both[b] += both
                    self.tallies[a].either[b] += kept[i] + kept[j] - both


def prune_tensor(
    task: Task, worker: Worker, pruning: Pruning, mask_name: str, save_format: str, engine
) -> list[dict]:
    """Prune one tensor of every vector; each record has hashes of base, vector and result, and the counts."""
    base, vectors = (task.inputs[0], task.inputs[1:]) if save_format == "model" else (None, task.inputs)
    dtypes = [vector.dtype for vector in vectors]
    overlaps = Overlaps(pruning, dtypes, vectors[0].numel, engine)
    base_hash = new_hash()
    vector_hashes, written_hashes = [new_hash() for _ in vectors], [new_hash() for _ in vectors]
    raw = {}

    def read(j: int, start: int, stop: int):
        raw[j] = worker.read(vectors[j], start, stop, j)
        bits = engine.load(raw[j])
        refuse_not_finite(vectors[j], bits, engine)
        return bits

    for start, stop, bits, masks in masks_by_block(
        pruning, mask_name, dtypes, vectors[0].numel, read, engine
    ):
        below = None
        if base:
            below = worker.read(base, start, stop, len(vectors))
            base_hash.update(below)
            below = engine.load(below)
            refuse_not_finite(base, below, engine)
        for j, vector in enumerate(vectors):
            vector_hashes[j].update(raw[j])
            out = apply_mask(below, base, bits[j], vector, masks[j], pruning.scale, engine)
            place = worker.room(task, j, start, stop)
            place[:] = out
            written_hashes[j].update(place)
        overlaps.take(start, bits, masks)
    return [
        {
            "base": base_hash.hexdigest(),
            "vector": vector_hashes[j].hexdigest(),
            "written": written_hashes[j].hexdigest(),
            "tally": asdict(tally),
        }
        for j, tally in enumerate(overlaps.tallies)
    ]


def apply_mask(below, base: Tensor | None, bits, vector: Tensor, mask, scale: float, engine):
    """The block to write: base + what the mask keeps, or what the mask keeps. Raises DataError on overflow."""
    if base is None:
        out, dtype = engine.keep_vector(bits, vector.dtype, mask, scale), vector.dtype
    else:
        out, dtype = engine.add_kept(below, base.dtype, bits, vector.dtype, mask, scale), base.dtype
    if not engine.all_finite(out, dtype):
        raise DataError(
            f"tensor {vector.name!r} of {vector.path.parent}: a result is beyond the largest {dtype}; use base and vectors "
            "in bfloat16 or float32, or no --rescale"
        )
    return engine.store(out)
