"""Two ways to the same answer: the torch kernels give the bits of the compiled ones, on every device there is."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEVICES, first_quick
from masks_by_block import masks_by_block

from common.pruners import kernels
from common.pruners.kernels import torch_engine
from common.pruners.kernels.torch_engine import engine
from common.pruners.pruning import Pruning
from common.pruners.tally import new_counts, tallies

BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}


def values(dtype: str, numel: int, seed: int, sparse: bool = False) -> np.ndarray:
    """Bits of finite values with many ties, zeros of both signs and subnormals; sparse: nine of ten are zeros."""
    numbers = np.random.default_rng(seed).standard_normal(numel).astype(np.float32)
    numbers[::3] = np.round(numbers[::3])
    numbers[::7] *= np.float32(1e-8)
    if sparse:
        numbers[np.random.default_rng(seed + 100).random(numel) < 0.9] *= 0
    if dtype == "F16":
        return numbers.astype(np.float16).view(np.uint16)
    return numbers.view(np.uint32) if dtype == "F32" else (numbers.view(np.uint32) >> 16).astype(np.uint16)


def pruned(pruning, dtype, vectors, base, arithmetic, block):
    """Masks, results and counts of one tensor as an engine makes them, as numpy arrays."""
    out = []
    counts = new_counts(len(vectors))
    held = {}

    def read(j, start, stop):
        held[j] = vectors[j][start:stop].copy()
        return arithmetic.load(held[j])

    numel = base.size
    for start, stop, bits, masks in masks_by_block(
        pruning, "t", [dtype] * len(vectors), numel, read, arithmetic, block
    ):
        below = arithmetic.load(base[start:stop].copy())
        for j, mask in enumerate(masks):
            assert arithmetic.tally(bits[j], dtype, masks, j, start, pruning.m, counts)
            added, kept = np.empty((2, stop - start), BITS[dtype])
            assert arithmetic.add_kept(added, below, dtype, bits[j], dtype, mask, pruning.scale)
            assert arithmetic.keep_vector(kept, bits[j], dtype, mask, pruning.scale)
            own = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask
            out += [added, kept, own.copy()]  # or the next block's mask would take its place
    return np.concatenate([part.astype(np.uint64) for part in out]), tallies(counts, numel)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", first_quick("F16", "BF16", "F32"))
@pytest.mark.parametrize(
    ("method", "n", "m"),
    first_quick(("nm", 64, 256), ("nm", 3, 32), ("nm", 700, 1000), ("magnitude", 64, 256), ("random", 64, 256)),
)
@pytest.mark.parametrize("conflict_aware", [True, False])
def test_same_bits(device, dtype, method, n, m, conflict_aware):
    base = values(dtype, 2311, 4)
    pruning = Pruning(method, n / m, n, m, seed=5, conflict_aware=conflict_aware, rescale=True)
    for block, sparse in ((1 << 18, ()), (300, ()), (1 << 18, (1, 2)), (300, (1, 2))):
        vectors = [values(dtype, 2311, seed, seed in sparse) for seed in (1, 2, 3)]
        ours = pruned(pruning, dtype, vectors, base, kernels, block)
        theirs = pruned(pruning, dtype, vectors, base, engine(device), block)
        np.testing.assert_array_equal(ours[0], theirs[0])
        for mine, other in zip(ours[1], theirs[1], strict=True):
            energies = [(tally.energy_kept, tally.energy) for tally in (mine, other)]
            np.testing.assert_allclose(*energies, rtol=1e-6)
            assert replace(mine, energy_kept=0, energy=0) == replace(other, energy_kept=0, energy=0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_same_random_numbers(device):
    """Far into a stream, where counters pass 32 bits, and with limits of none, some and all of 2**32."""
    torch_on = engine(device)
    taken = (np.arange(5000) % 3).astype(np.uint8)
    for start, count, key in ((0, 9, 0), (4096, 5000, 2**63 + 12345), (4 * (2**32 - 1), 12, 7)):
        for limits in ([1 << 30], [0], [1 << 32], [1 << 31, 0, 1 << 32]):
            ours, theirs = np.empty(count, np.uint8), torch_on.empty_masks(1, count)[0]
            kernels.random_mask(ours, start, key, taken[:count], limits)
            torch_on.random_mask(theirs, start, key, torch.from_numpy(taken[:count]).to(device), limits)
            np.testing.assert_array_equal(ours, theirs.cpu().numpy())


def test_engines_are_what_the_list_says():
    """One list: both modules have its functions with the same parameters, but for torch's device, and so do engines."""
    for name in kernels.ENGINE:
        ours, theirs = (list(inspect.signature(getattr(m, name)).parameters) for m in (kernels, torch_engine))
        assert ours == [parameter for parameter in theirs if parameter != "device"], name
    wanted = {*kernels.ENGINE, "BLOCK", "MAGNITUDE_BITS"}
    assert vars(kernels.engine("cpu")).keys() == vars(kernels.engine("cpu:0")).keys() == wanted
    assert kernels.engine("cpu").nm_mask is kernels.nm_mask and kernels.engine("cpu:0").nm_mask is torch_engine.nm_mask


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_not_finite_is_seen(bad):
    bits = np.array([1, bad, 2], np.float16).view(np.uint16)
    arithmetic = engine("cpu")
    assert not kernels.all_finite(bits, "F16")
    mask, zeros, out = np.ones(3, np.uint8), np.zeros(3, np.uint16), np.empty(3, np.uint16)
    for each, kept in ((kernels, mask), (arithmetic, torch.from_numpy(mask))):
        assert not each.tally(each.load(bits), "F16", kept[None], 0, 0, 2, new_counts(1))
        loaded = each.load(bits), "F16", kept, 1.0
        assert not each.keep_vector(out, *loaded)
        assert not each.add_kept(out, each.load(zeros), "F16", *loaded)
    assert not arithmetic.all_finite(arithmetic.load(bits), "F16")
