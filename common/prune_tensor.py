"""One tensor of all vectors: read, prune, add, count."""

from dataclasses import asdict

import numpy as np

from common.errors import DataError
from common.headers import Tensor
from common.pruners import Pruning, masks_by_block
from common.report import Tally
from common.stream import Task, Worker, new_hash, refuse_not_finite


class Counts:
    """Counts of one tensor for all vectors, block by block."""

    def __init__(self, pruning: Pruning, dtypes: list[str], numel: int, engine):
        self._m, self._dtypes, self._numel, self._engine = pruning.m, dtypes, numel, engine
        self._runs = [np.zeros(4, np.int64) for _ in dtypes]  # see kernels.tally_runs
        self._energy = np.zeros((len(dtypes), 2))
        self._both = np.zeros((len(dtypes), len(dtypes)), np.int64)

    def take(self, start: int, vectors: list, masks: list) -> None:
        """Count one block."""
        for j, mask in enumerate(masks):
            self._engine.tally_runs(mask, start, self._m, self._runs[j])
            self._energy[j] += self._engine.energy(vectors[j], self._dtypes[j], mask)
            for i in range(j):
                self._both[i, j] += self._engine.count_both(masks[i], mask)

    def tallies(self) -> list[Tally]:
        """What was counted, vector by vector."""
        both = self._both + self._both.T
        kept = np.array([runs[0] + runs[2] for runs in self._runs])
        either = kept[:, None] + kept - both
        np.fill_diagonal(either, 0)
        return [
            Tally(self._numel, int(kept[j]), both[j].tolist(), either[j].tolist(), *energy, runs.tolist())
            for j, (energy, runs) in enumerate(zip(self._energy.tolist(), self._runs, strict=True))
        ]


def prune_tensor(
    task: Task, worker: Worker, pruning: Pruning, mask_name: str, save_format: str, engine
) -> list[dict]:
    """Prune one tensor of every vector; each record has hashes of base, vector and result, and the counts."""
    base, vectors = (task.inputs[0], task.inputs[1:]) if save_format == "model" else (None, task.inputs)
    dtypes = [vector.dtype for vector in vectors]
    counts = Counts(pruning, dtypes, vectors[0].numel, engine)
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
            out = worker.room(task, j, start, stop)
            apply_mask(out, below, base, bits[j], vector, masks[j], pruning.scale, engine)
            written_hashes[j].update(out)
        counts.take(start, bits, masks)
    return [
        {
            "base": base_hash.hexdigest(),
            "vector": vector_hashes[j].hexdigest(),
            "written": written_hashes[j].hexdigest(),
            "tally": asdict(tally),
        }
        for j, tally in enumerate(counts.tallies())
    ]


def apply_mask(out, below, base: Tensor | None, bits, vector: Tensor, mask, scale: float, engine) -> None:
    """out = base + what the mask keeps, or what the mask keeps. Raises DataError on overflow."""
    if base is None:
        finite, dtype = engine.keep_vector(out, bits, vector.dtype, mask, scale), vector.dtype
    else:
        finite, dtype = engine.add_kept(out, below, base.dtype, bits, vector.dtype, mask, scale), base.dtype
    if not finite:
        raise DataError(
            f"tensor {vector.name!r} of {vector.path.parent}: a result is beyond the largest {dtype}; use base and vectors "
            "in bfloat16 or float32, or no --rescale"
        )
