"""Thresholds of scopes larger than a block: found by counting, from any first guess, with samples that help or
mislead.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from checkpoints import chain, prune_arguments, run
from conftest import first_quick
from hypothesis import given, settings
from kernel_cases import bits_with_ties, expect_oracle, pruned, tensor_of, vectors_of
from masks_by_block import masks_by_block

from common.pruners import kernels
from common.pruners import thresholds as passes
from common.pruners.kernels.torch_engine import engine
from common.pruners.masks import Masks
from common.pruners.pruning import Pruning
from common.pruners.thresholds import Search, Threshold, bracket
from common.shards import stream


@pytest.fixture
def small_samples(monkeypatch):
    """Tensors of more than 4 * 16 * 8 elements are sampled."""
    monkeypatch.setattr(passes, "_PIECES", 4)
    monkeypatch.setattr(passes, "_PIECE", 8)


def count(keys: np.ndarray, low: int, high: int, shift: int) -> tuple[list[int], int]:
    """What count_keys() counts, one by one: how many are in each bin, how many are `high` and more."""
    bins = [0] * ((high - low - 1 >> shift) + 1)
    for key in keys.tolist():
        if low <= key < high:
            bins[(key - low) >> shift] += 1
    return bins, sum(key >= high for key in keys.tolist())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_threshold_from_any_guess(data):
    """The k-th largest key and how many of its ties are kept, wherever the search begins and however wide it is."""
    top = data.draw(st.sampled_from([1 << 3, 1 << 15, 1 << 16, 1 << 31, 1 << 33]))
    keys = np.array(data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=40)))
    k = data.draw(st.integers(0, len(keys)))
    low = data.draw(st.integers(0, top - 1))
    high = data.draw(st.integers(low + 1, top))
    search, passed = Search(k, low, high, top), 0
    while search.threshold is None:
        passed += 1
        assert 0 <= search.low < search.high <= top
        counts, above = count(keys, search.low, search.high, search.shift)
        assert len(counts) == search.bins <= passes._BINS
        search.narrow(np.array(counts), above)
    if k == 0:
        assert search.threshold == Threshold(top - 1, 0) and passed == 0
        return
    least = sorted(keys.tolist(), reverse=True)[k - 1]
    assert search.threshold == Threshold(least, k - int((keys > least).sum()))
    assert passed <= 5


@pytest.mark.parametrize("row", [1, 3, 1024])
def test_a_rank_is_found_in_its_bin(row, monkeypatch):
    """Counting down one by one, with empty bins at every place, in rows that end anywhere."""
    monkeypatch.setattr(passes, "_ROW", row)
    for counts in ([5, 0, 2, 1], [0, 0, 3, 0], [1], [0, 7, 0, 0, 0, 1, 1, 0, 2, 0]):
        ranked = [number for number, count in enumerate(counts) for _ in range(count)][::-1]
        for rank, number in enumerate(ranked, start=1):
            wanted = number, sum(other > number for other in ranked)
            assert passes._bin_of(np.array(counts), rank) == wanted


@pytest.mark.slow
def test_bracket_holds_the_threshold():
    """Of 200 tensors 97 in 100 have it in there, in at most 3 % of their keys; pieces that differ widen it."""
    rng, held, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        keys = np.abs(rng.standard_normal(1 << 19) * 4000).astype(np.int64).clip(0, 32767)
        low, high = bracket(keys[: 1 << 15].reshape(16, -1), 0.25, 1 << 15)
        held += low <= np.partition(keys, -(keys.size // 4))[-(keys.size // 4)] < high
        widths.append(((keys >= low) & (keys < high)).mean())
    assert held >= 194 and max(widths) < 0.03
    scaled = (keys[: 1 << 15].reshape(16, -1) * np.linspace(0.5, 1.5, 16)[:, None]).astype(np.int64)
    low, high = bracket(scaled, 0.25, 1 << 16)
    assert ((scaled >= low) & (scaled < high)).mean() > 3 * max(widths)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.5, 1 - 1e-9, 1.0])
def test_brackets_of_extremes(share):
    """The least and the largest threshold, and keys that are all the same."""
    low, high = bracket(np.arange(64).reshape(16, 4).T, share, 128)
    assert 0 <= low < high <= 128
    assert (low == 0) == (share > 0.9) and (high == 128) == (share < 0.1)
    low, high = bracket(np.full((4, 16), 5), share, 128)
    assert low <= 5 < high


@pytest.mark.slow
@pytest.mark.parametrize("code", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("aware", [True, False])
def test_sampled_scopes_are_the_oracles(code, aware, small_samples):
    """Of every kind of values, sampled ones among them whose sample says nothing of the rest."""
    for kind in ("ties", "zeros", "steps", "bits"):
        for count in (1, 2, 3):
            vectors = vectors_of(kind, count, 700, code)
            for n in (1, 120, 299):
                expect_oracle("magnitude", vectors, code, n, 300, aware, block=64)
                expect_oracle("nm", vectors, code, n, 600, aware, block=64)
    for misled in (0.0, 3e4):
        for vector in vectors:
            for start in np.linspace(0, 700 - 8, 4).astype(int):
                vector[start : start + 8] = misled
        expect_oracle("magnitude", vectors, code, 100, 300, aware, block=64)


@pytest.mark.parametrize("dtype", first_quick("F16", "BF16", "F32"))
@pytest.mark.parametrize("conflict_aware", [True, False])
def test_sampled_scopes_on_torch(dtype, conflict_aware, small_samples):
    vectors, base = [bits_with_ties(dtype, 2311, seed) for seed in (1, 2, 3)], bits_with_ties(dtype, 2311, 4)
    pruning = Pruning("magnitude", 0.25, conflict_aware=conflict_aware)
    ours, theirs = (pruned(pruning, dtype, vectors, base, each, 300) for each in (kernels, engine("cpu")))
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_counting_many_and_few():
    """Keys in a wide bracket, in a narrow one and in one bin, in chunks of every length, against counting one by
    one."""
    rng = np.random.default_rng(0)
    for size in (1, 7, 4095, 4096, 4097, 9001):
        bits = (rng.standard_normal(size) * 0.002).astype(np.float16).view(np.uint16)
        keys = kernels.keys_of(bits, "F16", None, 0)
        assert np.array_equal(keys, np.abs(tensor_of(bits, "F16").numpy()).view(np.uint16))
        for low, high, shift in ((0, 1 << 15, 0), (6300, 6340, 0), (6300, 6340, 2), (6320, 6321, 0)):
            counts = np.zeros((high - low - 1 >> shift) + 1, np.int64)
            above = np.zeros(1, np.int64)
            kernels.count_keys(counts, above, bits, "F16", None, 0, low, high, shift)
            assert (counts.tolist(), above) == count(keys, low, high, shift)


def test_one_pass_finds_the_threshold():
    """A tensor like those of models is counted once, and the sample is small."""
    numel, calls = 600_000, []
    bits = (np.random.default_rng(0).standard_normal(numel) * 0.002).astype(np.float16).view(np.uint16)

    def read(j, start, stop):
        calls.append(stop - start)
        return bits[start:stop]

    for _ in masks_by_block(Pruning("magnitude", 0.25, conflict_aware=False), "x", ["F16"], numel, read, kernels):
        pass
    assert sum(calls) == 2 * numel + 16 * 2048


def passes_over(vectors: list[np.ndarray], dtype: str, aware: bool, block: int) -> list[list[int]]:
    """Which vectors each pass reads while magnitude's thresholds are found."""
    prunings, numel = [Pruning("magnitude", 0.25, conflict_aware=aware)] * len(vectors), vectors[0].size
    masks = Masks(prunings, "x", [dtype] * len(vectors), numel, kernels, block)
    scans = []

    def read(j, start, stop):
        return vectors[j][start:stop]

    def scan(which, spans, do):
        scans.append(list(which))
        masks.scanning(read)(which, spans, do)

    masks.find_thresholds(scan, read)
    return scans


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_vector_that_depends_on_none_shares_the_pass(count, small_samples):
    vectors = [bits_with_ties("F16", 2000, seed) for seed in range(count)]
    assert passes_over(vectors, "F16", False, 300)[0] == list(range(count))
    alone = passes_over(vectors, "F16", True, 300)
    assert list(dict.fromkeys(map(tuple, alone))) == [tuple(range(j + 1)) for j in range(count)]


@pytest.mark.parametrize("room, together", [(768, [[0, 1, 2]]), (767, [[0, 1], [2]]), (1, [[0], [1], [2]])])
def test_a_pass_has_room_for_so_many_bins(room, together, monkeypatch):
    """What does not fit beside others is counted after them, and what does not fit at all is counted alone."""
    monkeypatch.setattr(passes, "_LARGE_BINS", room)
    searches, found = {j: Search(1, 0, 1 << 15, 1 << 15, most=256) for j in range(3)}, []
    while searches:
        found.append(list(passes._that_fit(searches)))
        searches = {j: search for j, search in searches.items() if j not in found[-1]}
    assert found == together


@pytest.mark.slow
@pytest.mark.parametrize(
    "tails, together", [("normal", [[0, 1]]), ("laplace", [[0, 1]]), ("standard_cauchy", [[0], [1]])]
)
def test_heavy_tails_take_no_second_pass(tails, together):
    """Float32 keys of a tensor as large as k_proj: each threshold is found in the first pass over it."""
    rng = np.random.default_rng(0)
    vectors = [getattr(rng, tails)(size=1 << 22).astype(np.float32).view(np.uint32) for _ in range(2)]
    assert passes_over(vectors, "F32", False, kernels.BLOCK) == together


@pytest.mark.parametrize("method", ["nm", "random", "magnitude"])
@pytest.mark.parametrize("aware", ["--conflict_aware", "--no-conflict_aware"])
def test_progress_ends_at_the_whole(method, aware, tmp_path, monkeypatch, small_samples):
    """However many passes a method takes, the bar ends where it said it would."""
    bars = []

    class Bar(stream.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    chain(tmp_path)
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(stream, "tqdm", Bar)
    run("prune", *prune_arguments(tmp_path, "--pruning_method", method, aware))
    assert bars[0][0] == bars[0][1] > 0
