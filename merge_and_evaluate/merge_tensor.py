"""One tensor of a streamed merge: read blocks of all models, sum them by the recipe's method, write.

What a method keeps (masks, thresholds, the factors of `rescale`) does not depend on the weights. It is found once, in
passes of its own where a method needs them, and kept in `Found`, so that the next weight of a sweep does without those.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.errors import DataError
from common.pruners import kernels
from common.pruners.kernels import BITS_DTYPE
from common.pruners.kernels.philox import pack_mask, unpack_mask
from common.pruners.kernels.program import Program
from common.pruners.masks import Masks
from common.pruners.pruning import Pruning
from common.pruners.tally import new_counts, tallies, to_record
from common.shards.blocks import Reader, Writer, blocks
from common.shards.headers import DTYPE_CODES, DTYPE_NAMES
from common.shards.stream import Task, Worker, copy_tensor, new_hash, not_finite
from merge_and_evaluate.budgets import add_norms, empty_norms, rescale_factor, ties_budget
from merge_and_evaluate.streamed_methods import OURS, Values
from merge_and_evaluate.sum_inputs import Block, Rule
from merge_and_evaluate.sums import delta_sum, linear, vector_sum

# A program takes two of the kernels' blocks in one call: it leaves stretches behind, so a block need not stay in the
# caches as a whole, and half as many calls of Python's save what reads twice a tenth of its time (measured).
_AT_ONCE = 2


@dataclass(frozen=True)
class TensorMerge:
    """How one tensor is merged: the recipe's method and values for it, what it is written in, what masks depend on."""

    method: str
    values: Values
    dtype: str
    mask_name: str
    seed: int = 0

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(model["weight"] for model in self.values.models)

    @property
    def reads_twice(self) -> bool:
        """Whether the models are read twice or more: for thresholds, for the factors of `rescale`, for the sum."""
        if self.method == "magnitude":
            return True
        return self.rescales or (self.method == "ties" and min(self.densities) < 1)

    @property
    def rescales(self) -> bool:
        """Whether mergekit's `rescale` multiplies what is kept: of the methods that share it, all that drop something.

        task_arithmetic accepts `rescale` as well, and drops nothing.
        """
        drops = self.method in ("ties", "dare_linear", "dare_ties") and min(self.densities) < 1
        return drops and self.values.shared["rescale"]

    @property
    def common_group(self) -> int:
        """cabs: how many elements hold whole groups of every model."""
        return math.lcm(*(model["m"] for model in self.values.models))

    @property
    def densities(self) -> list[float]:
        """The fraction of each model's difference that is kept, from 0 to 1."""
        return [min(max(model["density"], 0.0), 1.0) for model in self.values.models]


@dataclass
class Found:
    """What does not depend on the weights: thresholds of each scope, and what `rescale` multiplies each model's kept
    values by."""

    thresholds: list | None = None
    scales: tuple[float, ...] | None = None


# --- what is kept ---------------------------------------------------------------------------------


def prunings_of(how: TensorMerge, numel: int) -> list[Pruning]:
    """What each model keeps of its difference, as the prune script says it; empty where a method keeps everything."""
    shared, models = how.values.shared, how.values.models
    if how.method in OURS:
        rule = {"conflict_aware": shared["conflict_aware"], "rescale": shared.get("rescale", False)}
        if how.method == "cabs":
            return [Pruning("nm", each["n"] / each["m"], each["n"], each["m"], **rule) for each in models]
        # 1 - (1 - density): the float64 that --sparsity_level 1 - density comes to, so that the masks are the chain's.
        densities = [1.0 - (1.0 - density) for density in how.densities]
        return [Pruning(OURS[how.method], density, seed=shared.get("seed", 0), **rule) for density in densities]
    if how.method in ("linear", "task_arithmetic") or min(how.densities) == 1.0:
        return []
    if how.method == "ties":  # the density of exactly the k that mergekit keeps: round(k / numel * numel) is k again
        shares = [ties_budget(density, numel) / max(numel, 1) for density in how.densities]
        return [Pruning("magnitude", share, conflict_aware=False) for share in shares]
    return [Pruning("random", density, seed=how.seed, conflict_aware=False) for density in how.densities]


def vector_dtype_of(how: TensorMerge) -> str:
    """What differences are formed in before they are ranked: as extraction does for our methods, else float32."""
    return DTYPE_CODES[how.values.shared["vector_dtype"]] if how.method in OURS else "F32"


def find_thresholds(how: TensorMerge, masks: Masks, readers: list[Reader]) -> list:
    """Of each scope, every model's threshold. Reads the base and the models in passes: see Scope.find()."""
    dtype = vector_dtype_of(how)

    def peek(j: int, start: int, stop: int) -> np.ndarray:
        base, model, out = readers[0].peek(start, stop), readers[1 + j], np.empty(stop - start, BITS_DTYPE[dtype])
        bits = model.peek(start, stop)
        if not kernels.subtract(bits, model.dtype, base, readers[0].dtype, out, dtype):
            refuse(how, [readers[0], model], [base, bits])
        return out

    # A callback, since only the search knows what to count in which pass; how blocks are read is this function's.
    def scan(which, spans, do) -> None:
        read = [readers[0], *(readers[1 + j] for j in which)]

        def note(engine, start: int, bits: list) -> None:
            do(engine, start, _differences(engine, bits, read, dtype))

        _scan(how, read, spans, Program(note))

    masks.find_thresholds(scan, peek)
    return masks.thresholds


def find_scales(how: TensorMerge, masks: Masks, readers: list[Reader], worker: Worker) -> tuple[tuple, list | None]:
    """mergekit's `rescale`: each model's kept differences are brought to the L1 norm of all of them; reads all once.

    Returns the factors, and each model's mask with a bit an element (see pack_mask), which need not be made again;
    None where the worker has no room for them. Thresholds, if masks are made by them, have to be found before.
    """
    norms = [empty_norms() for _ in how.values.models]
    rooms = [worker.room(4 * -(-readers[0].numel // 32)) for _ in norms]
    packed = None if any(room is None for room in rooms) else [room.view(np.uint32) for room in rooms]

    def note(engine, start: int, bits: list) -> None:
        vectors = _differences(engine, bits, readers, "F32")
        own = masks.by(engine)
        kept = own.of(start, vectors) if how.method == "ties" else own.drawn(start, len(bits[0]))
        for j, mask in enumerate(kept):
            engine.add(add_norms.steps, norms[j], vectors[j], mask)
            if packed:
                engine.add(pack_mask.steps, packed[j], start, mask)

    _scan(how, readers, masks.blocks(), Program(note, masks.unit))
    return tuple(float(rescale_factor(sums)) for sums in norms), packed


def _scan(how: TensorMerge, readers: list[Reader], spans, program: Program) -> None:
    """Take the program on every block of what is read; nothing is written."""
    for start, stop in spans:
        raw = [reader.read(start, stop) for reader in readers]
        if not program.run(start, raw):
            refuse(how, readers, raw)


def _differences(engine, bits: list[np.ndarray], readers: list[Reader], dtype: str) -> list[np.ndarray]:
    """Each model minus the base, in an engine's scratch memory, rounded as extract_task_vector_7b.py rounds."""
    vectors = [engine.scratch(dtype) for _ in bits[1:]]
    for vector, model, reader in zip(vectors, bits[1:], readers[1:], strict=True):
        engine.subtract(model, reader.dtype, bits[0], readers[0].dtype, vector, dtype)
    return vectors


# --- the merge ------------------------------------------------------------------------------------


def merge_tensor(task: Task, worker: Worker, how: TensorMerge | None, found: Found) -> list[dict]:
    """Merge one tensor; its record has the hash of every input's bytes and of what was written, and our methods'
    counts.

    The task's inputs are the base and the models, for `linear` the models alone. A buffer (how is None) is the base's.
    What is found in a first pass does not depend on the weights, so a sweep's next merge finds it in `found`.
    """
    if how is None:
        return copy_tensor(task, worker)
    (writer,) = worker.writers(task)
    readers = [worker.reader(tensor, again=how.reads_twice) for tensor in task.inputs]
    numel, block = task.inputs[0].numel, _AT_ONCE * kernels.BLOCK
    prunings = prunings_of(how, numel)
    if not prunings:
        note = partial(_note_linear if how.method == "linear" else _note_differences, how, readers)
        return [_write(how, readers, writer, Program(note), blocks(numel, block))]
    dtypes, packed = [vector_dtype_of(how)] * len(prunings), None
    masks = Masks(prunings, how.mask_name, dtypes, numel, kernels, block)
    if masks.in_passes:
        if found.thresholds is None:
            found.thresholds = find_thresholds(how, masks, readers)
        masks.thresholds = found.thresholds
    if how.rescales and found.scales is None:
        # `packed` is not for `found`: a sweep would hold the masks of the whole model.
        found.scales, packed = find_scales(how, masks, readers, worker)
        masks.rewind()
    counts = new_counts(len(prunings))
    if how.method in OURS:
        note = partial(_note_vectors, how, readers, masks=masks, prunings=prunings, counts=counts)
    else:
        note = partial(_note_differences, how, readers, masks=masks, packed=packed, scales=found.scales)
    record = _write(how, readers, writer, Program(note, masks.unit), masks.blocks(), masks.scope_of)
    if how.method in OURS:
        record["tallies"] = [to_record(tally) for tally in tallies(counts, numel)]
    return [record]


def _write(how: TensorMerge, readers: list[Reader], writer: Writer, program: Program, spans, scope_of=None) -> dict:
    """Take the program on every block of what is read, into the writer's room -> hashes of each input and of what was
    written.
    """
    inputs, written = [new_hash() for _ in readers], new_hash()
    for start, stop in spans:
        raw, out = [reader.read(start, stop) for reader in readers], writer.room(start, stop)
        if not program.run(start, [out, *raw], scope_of and scope_of(start)):
            refuse(how, readers, raw)
        for state, bits in zip([*inputs, written], [*raw, out], strict=True):
            state.update(bits)
    return {"inputs": [state.hexdigest() for state in inputs], "written": written.hexdigest()}


# What a program notes, for a stretch of the output and of each input that begins at element `start` of its tensor.


def _as_blocks(bits: list[np.ndarray], readers: list[Reader]) -> list[Block]:
    return [Block(each, reader.dtype) for each, reader in zip(bits, readers, strict=True)]


def _note_linear(how: TensorMerge, readers: list[Reader], engine, _: int, arrays: list) -> None:
    out, *models = arrays
    normalize = how.values.shared["normalize"]
    engine.add(linear.steps, Block(out, how.dtype), _as_blocks(models, readers), how.weights, normalize)


def _note_differences(
    how: TensorMerge, readers: list[Reader], engine, start: int, arrays: list, masks=None, packed=None, scales=None
) -> None:
    """task_arithmetic, ties, dare_linear, dare_ties. packed: masks that need not be made again, from find_scales()."""
    out, *bits = arrays
    shared, elect = how.values.shared, how.method in ("ties", "dare_ties")
    base, *models = _as_blocks(bits, readers)
    kept = None
    if packed:
        kept = engine.empty_masks(len(models), out.size)
        for words, mask in zip(packed, kept, strict=True):
            engine.add(unpack_mask.steps, words, start, mask)
    elif masks and how.method == "ties":
        kept = masks.by(engine).of(start, _differences(engine, bits, readers, vector_dtype_of(how)))
    elif masks:
        kept = masks.by(engine).drawn(start, out.size)
        for block in models:  # what is dropped, too
            engine.all_finite(block.bits, block.dtype)
    rule = Rule(how.weights, shared["normalize"], shared["lambda"], elect, scales)
    place = start, readers[0].numel
    engine.add(delta_sum.steps, Block(out, how.dtype), base, models, rule, place, kept)


def _note_vectors(
    how: TensorMerge, readers: list[Reader], engine, start: int, arrays: list, masks: Masks, prunings: list, counts
) -> None:
    """cabs, magnitude, random: base + Σ weight · pruned task vector, the masks of prune_task_vector_7b.py."""
    out, *bits = arrays
    weights = tuple(weight * pruning.scale for weight, pruning in zip(how.weights, prunings, strict=True))
    dtype, consensus = vector_dtype_of(how), how.values.shared["consensus"] == "sign"
    vectors = _differences(engine, bits, readers, dtype)
    kept = masks.by(engine).of(start, vectors)
    for j, pruning in enumerate(prunings):
        engine.tally(vectors[j], dtype, kept, j, start, pruning.m, counts)
    base, added = Block(bits[0], readers[0].dtype), [Block(vector, dtype) for vector in vectors]
    engine.add(vector_sum.steps, Block(out, how.dtype), base, added, kept, weights, consensus)


# --- what is refused ------------------------------------------------------------------------------


def refuse(how: TensorMerge, readers: list[Reader], raw: list[np.ndarray]) -> None:
    """Raise DataError for a block that is not finite: an input is not, or a difference or the sum is too large."""
    for reader, bits in zip(readers, raw, strict=True):
        if not kernels.all_finite(bits, reader.dtype):
            raise not_finite(reader.tensor)
    if prunings_of(how, readers[0].numel):
        refuse_difference(raw, readers, vector_dtype_of(how))
    raise DataError(
        f"tensor {readers[0].tensor.name!r} of the merge: a sum is beyond the largest {DTYPE_NAMES[how.dtype]}; lower "
        "the weights, or set out_dtype: bfloat16 or float32 in the recipe"
    )


def refuse_difference(raw: list[np.ndarray], readers: list[Reader], dtype: str) -> None:
    """Raise DataError for a difference of finite values that is too large for `dtype`, if there is one."""
    for model, reader in zip(raw[1:], readers[1:], strict=True):
        room = np.empty(model.size, BITS_DTYPE[dtype])
        if not kernels.subtract(model, reader.dtype, raw[0], readers[0].dtype, room, dtype):
            raise DataError(
                f"tensor {reader.tensor.name!r} of {reader.tensor.path.parent}: its difference from the base is beyond "
                f"the largest {DTYPE_NAMES[dtype]}; set vector_dtype: bfloat16 or float32 under the recipe's "
                "`parameters`"
            )
