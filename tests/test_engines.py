"""Two ways to the same answer: the torch kernels give the bits of the compiled ones, on every device there is."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEVICES, first_quick
from kernel_cases import bits_with_ties, pruned

from common.pruners import kernels
from common.pruners.kernels import torch_engine
from common.pruners.kernels.torch_engine import engine
from common.pruners.pruning import Pruning
from common.pruners.tally import new_counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", first_quick("F16", "BF16", "F32"))
@pytest.mark.parametrize(
    ("method", "n", "m"),
    first_quick(("nm", 64, 256), ("nm", 3, 32), ("nm", 700, 1000), ("magnitude", 64, 256), ("random", 64, 256)),
)
@pytest.mark.parametrize("conflict_aware", [True, False])
def test_same_bits(device, dtype, method, n, m, conflict_aware):
    base = bits_with_ties(dtype, 2311, 4)
    pruning = Pruning(method, n / m, n, m, seed=5, conflict_aware=conflict_aware, rescale=True)
    for block, sparse in ((1 << 18, ()), (300, ()), (1 << 18, (1, 2)), (300, (1, 2))):
        vectors = [bits_with_ties(dtype, 2311, seed, seed in sparse) for seed in (1, 2, 3)]
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
