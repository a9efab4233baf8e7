"""Programs: several kernels taken chunk by chunk give what they give one by one, whatever chunks and blocks are."""

import numpy as np
import pytest
from conftest import first_quick
from kernel_cases import bits_with_ties

from common.pruners import kernels
from common.pruners.kernels import program
from common.pruners.kernels.compiler import Step, in_steps, list_steps
from common.pruners.kernels.philox import pack_mask, unpack_mask
from common.pruners.kernels.program import Program
from common.pruners.masks import Masks
from common.pruners.pruning import Pruning
from common.pruners.tally import new_counts, tallies

NUMEL = 2311


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of a few thousand elements take many chunks, groups of a small m come one by one, too."""
    monkeypatch.setattr(program, "STRETCH", 64)
    monkeypatch.setattr("common.pruners.masks._GROUPS", 1)


def one_by_one(prunings, dtype, base, models):
    """Differences, masks and counts, each kernel called on the whole tensor."""
    masks, counts = Masks(prunings, "t", [dtype] * len(models), NUMEL, kernels), new_counts(len(models))
    vectors = [np.empty_like(base) for _ in models]
    for vector, model in zip(vectors, models, strict=True):
        kernels.subtract(model, dtype, base, dtype, vector, dtype)
    if masks.in_passes:

        def read(j, start, stop):
            return vectors[j][start:stop]

        masks.find_thresholds(masks.scanning(read), read)
    kept = []
    for start, stop in masks.blocks():
        part = [vector[start:stop] for vector in vectors]
        found = masks.of(start, part)
        for j, pruning in enumerate(prunings):
            kernels.tally(part[j], dtype, found, j, start, pruning.m, counts)
        kept.append([mask.copy() for mask in found])
    return np.concatenate(kept, axis=1), tallies(counts, NUMEL)


def by_program(prunings, dtype, base, models, block):
    """The same by a program, in blocks of so many elements; masks are written as an output is."""
    masks, counts = Masks(prunings, "t", [dtype] * len(models), NUMEL, kernels, block), new_counts(len(models))
    kept = np.empty((len(models), NUMEL), np.uint8)

    def differences(engine, arrays):
        vectors = [engine.scratch(dtype) for _ in arrays[1:]]
        for vector, model in zip(vectors, arrays[1:], strict=True):
            engine.subtract(model, dtype, arrays[0], dtype, vector, dtype)
        return vectors

    def scan(which, spans, do):
        counting = Program(lambda engine, start, arrays: do(engine, start, differences(engine, arrays)))
        for start, stop in spans:
            assert counting.run(start, [base[start:stop], *(models[j][start:stop] for j in which)])

    def peek(j, start, stop):
        out = np.empty_like(base[start:stop])
        kernels.subtract(models[j][start:stop], dtype, base[start:stop], dtype, out, dtype)
        return out

    def note(engine, start, arrays):
        outs, inputs = arrays[: len(models)], arrays[len(models) :]
        vectors = differences(engine, inputs)
        found = masks.by(engine).of(start, vectors)
        for j, pruning in enumerate(prunings):
            engine.tally(vectors[j], dtype, found, j, start, pruning.m, counts)
            engine.count_taken(outs[j], found[j], np.zeros_like(found[j]))

    if masks.in_passes:
        masks.find_thresholds(scan, peek)
    taking = Program(note, masks.unit)
    for start, stop in masks.blocks():
        arrays = [*(mask[start:stop] for mask in kept), base[start:stop], *(model[start:stop] for model in models)]
        assert taking.run(start, arrays, masks.scope_of(start))
    return kept, tallies(counts, NUMEL)


@pytest.mark.parametrize("dtype", first_quick("F16", "BF16", "F32"))
@pytest.mark.parametrize("conflict_aware", [True, False])
@pytest.mark.parametrize(
    ("method", "n", "m"), first_quick(("nm", 64, 256), ("magnitude", 1, 4), ("nm", 3, 32), ("nm", 700, 1000))
)
def test_chunks_change_nothing(method, n, m, conflict_aware, dtype):
    """Chunks that end within a block and blocks that end within a chunk; a scope of several blocks; three vectors."""
    base, *models = (bits_with_ties(dtype, NUMEL, seed) for seed in range(4))
    prunings = [Pruning(method, n / m, n, m, conflict_aware=conflict_aware)] * 3
    wanted = one_by_one(prunings, dtype, base, models)
    for block in (1 << 18, 1000, 300):
        masks, counts = by_program(prunings, dtype, base, models, block)
        np.testing.assert_array_equal(masks, wanted[0])
        for mine, theirs in zip(counts, wanted[1], strict=True):
            np.testing.assert_allclose([mine.energy_kept, mine.energy], [theirs.energy_kept, theirs.energy], rtol=1e-6)
            assert (mine.kept, mine.both, mine.groups, mine.squares, mine.tail, mine.nonzero) == (
                theirs.kept,
                theirs.both,
                theirs.groups,
                theirs.squares,
                theirs.tail,
                theirs.nonzero,
            )


@pytest.mark.parametrize("conflict_aware", [True, False])
def test_draws_go_by_the_position_in_the_tensor(conflict_aware):
    base, *models = (bits_with_ties("F16", NUMEL, seed) for seed in range(4))
    prunings = [Pruning("random", density, conflict_aware=conflict_aware) for density in (0.5, 0.3, 0.6)]
    wanted, _ = one_by_one(prunings, "F16", base, models)
    for block in (1 << 18, 1000):
        np.testing.assert_array_equal(by_program(prunings, "F16", base, models, block)[0], wanted)


@pytest.mark.parametrize("numel", [1, 7, 8, 31, 32, 33, 64, 4133])
def test_a_packed_mask_is_unpacked_as_it_was(numel):
    mask, words, out = (np.random.default_rng(0).random(numel) < 0.4).astype(np.uint8), None, np.empty(numel, np.uint8)
    words = np.full(numel // 32 + 4, 0xFFFFFFFF, np.uint32)
    pack_mask(words, 64, mask)
    unpack_mask(words, 64, out)
    np.testing.assert_array_equal(out, mask)
    np.testing.assert_array_equal(np.unpackbits(words[2:].view(np.uint8), bitorder="little")[:numel], mask)


def test_it_stops_at_the_first_that_is_not_finite():
    """What comes after it sees nothing: no count goes on, no later chunk is looked at."""
    bits, counts = np.zeros(200, np.uint16), new_counts(1)
    bits[70] = 0x7C00

    def note(engine, start, arrays):
        masks = engine.empty_masks(1, arrays[0].size)
        engine.count_taken(masks[0], np.ones_like(masks[0]), np.zeros_like(masks[0]))
        engine.all_finite(arrays[0], "F16")
        engine.tally(arrays[0], "F16", masks, 0, start, 4, counts)

    assert not Program(note).run(0, [bits])
    assert tallies(counts, 200)[0].groups == 64 // 4


def test_a_part_of_a_stand_in_is_refused():
    def note(engine, _, arrays):
        engine.all_finite(arrays[0], "F16")
        engine.drop_zeros(np.empty(64, np.uint8), arrays[1][:64], "F16")

    with pytest.raises(ValueError, match="part of a stand-in"):
        Program(note).run(0, [np.zeros(64, np.uint16), np.zeros(64, np.uint16)])


def test_what_does_not_fit_is_no_step():
    """Kernels check no bounds: lengths, gaps and what may not be written to are checked before."""
    step, frozen = kernels.all_finite.steps(np.zeros(8, np.uint16), "F16")[0], np.zeros(8, np.uint16)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="blocks of one size, got 8 elements beside 9"):
        list_steps([step], 9)
    for array in (np.zeros(16, np.uint16)[::2], frozen):
        with pytest.raises(ValueError, match="an array for a kernel: underlying buffer is not"):
            list_steps([Step(step.kernel, (array,))], 8)
    assert in_steps(lambda: [step])() and in_steps(list)()
