"""The pruning rule and the arithmetic: bit for bit against the oracle, and properties of every mask."""

from itertools import product

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from conftest import first_quick
from hypothesis import given, settings
from kernel_cases import UNSIGNED, bits_of, expect_oracle, our_masks, pruning_of, tensor_of, vectors_of

from common.pruners import kernels
from common.pruners.kernels import torch_engine
from common.pruners.pruning import Pruning, random_key, scopes
from common.pruners.tally import new_counts, tallies

ENGINES = [kernels, torch_engine.engine("cpu")]
SMALL, LARGE = 4, 256  # m that is ranked side by side, and group by group; few, because each is compiled


# --- ranking against the oracle -------------------------------------------------------------------


@pytest.mark.parametrize("code", first_quick("F16", "BF16", "F32"))
@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("m, ns", [(SMALL, (1, 2, 3, 4)), (LARGE, (1, 64, 128, 200, 256))])
def test_nm_is_the_oracles(code, aware, m, ns):
    """n below, at and above m/2, ties, zeros; whole groups, tails, and tensors smaller than a group."""
    for n in ns:
        for numel in (1, m - 1, m, 128 * SMALL * 2 + 7 * m + 3):
            for kind in ("ties", "zeros", "steps", "bits"):
                for count in (1, 2, 3):
                    expect_oracle("nm", vectors_of(kind, count, numel, code, n), code, n, m, aware)


@pytest.mark.parametrize("code", first_quick("F16", "BF16", "F32"))
@pytest.mark.parametrize("aware", [True, False])
def test_scopes_larger_than_a_block(code, aware):
    """magnitude, and nm with m beyond a block: several passes over blocks, thresholds with ties."""
    for kind in ("ties", "bits"):
        for count in (1, 2, 3):
            vectors = vectors_of(kind, count, 700, code)
            for n in (1, 120, 200):
                expect_oracle("nm", vectors, code, n, 300, aware, block=64)
                expect_oracle("magnitude", vectors, code, n, 300, aware, block=64)


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 66_000])
def test_groups_too_long_to_count_in_16_bits(n):
    """m of 70000 within one block, and ties beyond the 65536th."""
    vectors = vectors_of("ties", 2, 140_001, "F16", n)
    expect_oracle("nm", vectors, "F16", n, 70_000, True)


def test_the_textbook_case():
    """CABS by hand: 2:4, the second vector takes what the first left, lower index first among equals."""
    first, second = torch.tensor([4.0, -3.0, 2.0, 1.0]).half(), torch.tensor([9.0, 8.0, -5.0, 5.0]).half()
    masks = our_masks(pruning_of("nm", 2, 4, True), [first, second], "F16")
    assert masks == [[True, True, False, False], [False, False, True, True]]
    masks = our_masks(pruning_of("nm", 3, 4, True), [first, second], "F16")  # densities add up to 1.5
    assert masks == [[True, True, True, False], [True, True, False, True]]


def test_tails_keep_their_share():
    """A last group of r keeps ceil(n*r/m); magnitude keeps round(density * numel), half to even."""
    assert scopes(pruning_of("nm", 64, 256, True), 259) == [(0, 256, 64), (256, 259, 1)]
    assert scopes(pruning_of("nm", 3, 4, True), 7) == [(0, 4, 3), (4, 7, 3)]
    assert [scopes(Pruning("magnitude", 0.25), numel)[0][2] for numel in (1, 2, 6, 10)] == [0, 0, 2, 2]


@pytest.mark.parametrize("method", ["nm", "magnitude", "random"])
def test_blocks_do_not_change_masks(method):
    """Any block size gives the masks of one block."""
    vectors = vectors_of("ties", 3, 3000, "F16")
    for aware, (n, m) in product((True, False), ((1, SMALL), (100, LARGE))):
        pruning = pruning_of(method, n, m, aware)
        whole = our_masks(pruning, vectors, "F16")
        assert all(our_masks(pruning, vectors, "F16", block=block) == whole for block in (4, 30, 101, 1024))


@pytest.mark.parametrize("dtype", first_quick("F16", "F32"))
def test_topk_agrees_on_distinct_values(dtype):
    """torch.topk keeps the same where no two magnitudes are equal."""
    order = torch.randperm(2560, generator=torch.Generator().manual_seed(0))
    patterns = {"F16": (order * 12 + 1).short().view(torch.float16), "F32": order.float() * 0.37 + 0.1}[dtype]
    vector = torch.where(order % 3 == 0, -patterns, patterns)
    for n, m in ((1, SMALL), (200, LARGE)):
        want = torch.zeros(2560 // m, m).scatter_(1, vector.float().abs().view(-1, m).topk(n).indices, 1).bool()
        assert our_masks(pruning_of("nm", n, m, True), [vector], dtype) == [want.flatten().tolist()]
    kept = torch.zeros(2560).scatter_(0, vector.float().abs().topk(640).indices, 1).bool()
    assert our_masks(Pruning("magnitude", 0.25), [vector], dtype) == [kept.tolist()]


# --- random ---------------------------------------------------------------------------------------

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key -> words
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def expect_draws(start: int, key: int, words: list[int]):
    """Ours draw these words, from the position `start` on: each is below the next number and not below itself."""
    mask, level = np.empty(len(words), np.uint8), np.zeros(len(words), np.uint8)
    for word in words[:20] + words[-20:]:
        at = [i for i, other in enumerate(words) if other == word]
        for limit, drawn in ((word, False), (word + 1, True)):
            kernels.random_mask(mask, start, key, level, [limit])
            assert (mask[at] == drawn).all()
            assert mask.tolist() == [other < limit for other in words]


def test_philox_known_answers():
    """The oracle's generator gives the published words; ours gives the oracle's, from any start."""
    for counter, key, words in KNOWN_ANSWERS:
        assert oracle.philox(counter, key) == words
    expect_draws(0, 0, KNOWN_ANSWERS[0][2])
    for key in (1, 2**32, 0x299F31D0A4093822, 2**64 - 1):
        for start in (0, 4, 2**34):
            words = oracle.philox([start // 4 & 0xFFFFFFFF, start // 4 >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])
            expect_draws(start, key, words)
        expect_draws(0, key, oracle.draws(5001, key).tolist())


@pytest.mark.parametrize("density", [0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("aware", [True, False])
def test_random_is_the_oracles(density, aware):
    vectors = vectors_of("ties", 3, 1999, "F16")
    pruning = Pruning("random", density, seed=11, conflict_aware=aware)
    for name in ("model.embed_tokens.weight", "ünïcode"):
        want = oracle.random_masks([vector.tolist() for vector in vectors], density, aware, 11, name)
        assert our_masks(pruning, vectors, "F16", name) == want
    assert random_key(pruning, 0, "x") != random_key(pruning, 1, "x")


def test_random_keeps_its_density():
    """Each of four conflict-aware vectors keeps its expected share; the overlap is the least possible."""
    count, numel = 4, 40_000
    for density in (0.2, 0.4, 0.6):
        pruning = Pruning("random", density, seed=5, conflict_aware=True)
        masks = np.array(our_masks(pruning, [torch.ones(numel).half()] * count, "F16"))
        assert np.abs(masks.mean(axis=1) - density).max() < 5 * (0.25 / numel) ** 0.5
        if 2 * density <= 1:
            assert not (masks[0] & masks[1]).any()
        else:  # what is free is taken whole
            assert (masks[0] | masks[1]).all()


# --- properties -----------------------------------------------------------------------------------

FLOATS = st.floats(-8, 8, width=16)


@st.composite
def cases(draw):
    """(n, m, vectors) with few distinct values, so that ties are the rule."""
    m = draw(st.sampled_from([SMALL, LARGE]))
    n, numel, count = draw(st.integers(1, m)), draw(st.integers(1, 600)), draw(st.integers(1, 3))
    pool = draw(st.lists(FLOATS, min_size=1, max_size=6))
    picks = np.random.default_rng(draw(st.integers(0, 99))).integers(0, len(pool), (count, numel))
    return n, m, [torch.tensor(np.array(pool)[row]).half() for row in picks]


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(ENGINES))
def test_properties_of_conflict_aware_nm(case, engine):
    """The first as if alone; no zeros; nothing left out that ranks before what is kept; the least overlap there is."""
    n, m, vectors = case
    pruning = pruning_of("nm", n, m, True)
    masks = np.array(our_masks(pruning, vectors, "F16", engine=engine))
    sizes = np.abs([vector.numpy() for vector in vectors])
    assert our_masks(pruning, vectors[:1], "F16")[0] == masks[0].tolist()
    assert not masks[sizes == 0].any()
    for start, stop, k in scopes(pruning, vectors[0].numel()):
        earlier = np.zeros(stop - start, int)
        for mask, size in zip(masks[:, start:stop], sizes[:, start:stop], strict=True):
            free = (earlier == 0).sum()
            assert mask.sum() <= k and (free < k or not earlier[mask].any())
            assert mask.sum() >= min(k, (size[earlier == 0] > 0).sum())
            ranks = np.lexsort((np.arange(stop - start), -size, earlier))
            assert mask[ranks[:k]].tolist() == (size[ranks[:k]] > 0).tolist() and not mask[ranks[k:]].any()
            earlier += mask
        if (sizes > 0).all():  # exactly k each, and how often each position is kept is as even as it can be
            assert (masks[:, start:stop].sum(axis=1) == k).all()
            assert earlier.max() <= -(-k * len(vectors) // (stop - start))
            assert earlier.min() >= k * len(vectors) // (stop - start)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**63), st.booleans(), st.sampled_from(ENGINES))
def test_properties_of_other_methods(case, seed, aware, engine):
    """magnitude keeps round(density*numel) but for zeros, none smaller than what it drops; random obeys its seed."""
    n, m, vectors = case
    numel = vectors[0].numel()
    mask = np.array(our_masks(pruning_of("magnitude", n, m, False), vectors[:1], "F16", engine=engine)[0])
    size = vectors[0].abs().numpy()
    assert mask.sum() == min(round(n / m * numel), (size > 0).sum())
    assert not mask.any() or mask.all() or size[mask].min() >= size[~mask].max()
    pruning = Pruning("random", n / m, seed=seed, conflict_aware=aware)
    masks = np.array(our_masks(pruning, vectors, "F16", engine=engine))
    drawn = np.array(our_masks(pruning, [torch.ones(numel).half()] * len(vectors), "F16"))
    assert (masks == (drawn & (np.array([vector.numpy() for vector in vectors]) != 0))).all()
    assert masks[0].tolist() == our_masks(pruning, vectors[:1], "F16")[0]


# --- zeros are in nobody's way --------------------------------------------------------------------

WAYS = [("nm", 64, 256), ("nm", 128, 256), ("nm", 1, 4), ("nm", 200, 256), ("magnitude", 64, 256), ("random", 64, 256)]


def shares_of_energy(masks: list, vectors: list) -> list[float]:
    """Of each vector, the share of its squared L2 norm that its mask keeps."""
    squares = [vector.double().numpy() ** 2 for vector in vectors]
    return [square[mask].sum() / square.sum() for square, mask in zip(squares, masks, strict=True)]


def ordinary(numel: int, seed: int) -> torch.Tensor:
    """Normal values without a zero, as of a full fine-tune."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(numel)).add(1e-6).half()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", [None, 4096, 1000])
@pytest.mark.parametrize("method, n, m", WAYS)
def test_frozen_tensors_are_in_nobodys_way(method, n, m, block, engine):
    """A first vector of zeros, of either sign, changes nothing: it keeps nothing, the second what it keeps alone."""
    zeros, second = torch.zeros(20_480).half(), ordinary(20_480, 1)
    zeros[::2] = -0.0
    pruning = pruning_of(method, n, m, True)
    first, kept = our_masks(pruning, [zeros, second], "F16", block=block, engine=engine)
    alone = our_masks(pruning, [second], "F16")[0]
    assert not any(first)
    if method != "random":
        assert kept == alone
        share = {(64, 256): 0.725, (128, 256): 0.93}.get((n, m) if method == "nm" else None)
        assert share in (None, pytest.approx(shares_of_energy([kept], [second])[0], abs=0.005))
    else:  # what the first draws is taken, zero or not
        ones = torch.ones(20_480).half()
        assert kept == our_masks(pruning, [ones, ones], "F16")[1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.90, 0.96])
@pytest.mark.parametrize("n, old, alone", [(64, 0.608, 0.725), (128, 0.50, 0.93)])
def test_sparse_first_vectors_are_in_nobodys_way(share, n, old, alone, engine):
    """A first vector that is mostly zeros (DPO) takes what it changes and no more from the second."""
    rng = np.random.default_rng(7)
    first, second = ordinary(102_400, 2), ordinary(102_400, 3)
    first[torch.from_numpy(rng.random(102_400) < share)] = 0
    masks = our_masks(pruning_of("nm", n, 256, True), [first, second], "F16", engine=engine)
    kept = shares_of_energy(masks, [first, second])[1]
    assert np.array(masks[0]).sum() == (first != 0).sum() and not np.logical_and(*masks).any()
    assert old + 0.03 < alone * share - 0.01 < kept < alone + 0.005
    expect_oracle("nm", [first, second], "F16", n, 256, True)


@pytest.mark.parametrize("engine", ENGINES)
def test_free_zeros_use_budget(engine):
    """By hand, 3:4: the free zero ranks before what is taken, so it uses budget, but nobody keeps it."""
    first, second, third = (torch.tensor(row).half() for row in ([4.0, 3, 2, 0], [9.0, 8, 7, 0], [1.0, 2, 3, 4]))
    masks = our_masks(pruning_of("nm", 3, 4, True), [first, second, third], "F16", engine=engine)
    assert masks == [[True, True, True, False], [True, True, False, False], [False, True, True, True]]


@pytest.mark.parametrize("method, n, m", WAYS)
def test_outputs_of_one_vector_are_those_with_zeros_kept(method, n, m):
    """A vector pruned alone: the sum is that of the rule that kept zeros as well (of a base without -0.0)."""
    base, vector = ordinary(9000, 4), vectors_of("zeros", 1, 9000, "F16", 5)[0]
    vector += 0.0  # no -0.0 either, which the task vector's file would have held
    mask = our_masks(pruning_of(method, n, m, True), [vector], "F16")[0]
    with_zeros = our_masks(
        pruning_of(method, n, m, True), [torch.where(vector == 0, 6e-8, vector.double()).half()], "F16"
    )[0]
    for out in (oracle.vector_tensor, lambda *args: oracle.model_tensor(base, *args)):
        assert oracle.same(out(vector, mask, torch.tensor(1.0)), out(vector, with_zeros, torch.tensor(1.0)))
    assert with_zeros != mask


# --- values ---------------------------------------------------------------------------------------


def expect_conversion(tensor: torch.Tensor, source: str, target: str, clamp: bool):
    """Bits and counts of one conversion against torch."""
    bits = bits_of(tensor, source)
    out = np.empty(bits.size, UNSIGNED[target])
    counts = np.array([7, 8])
    finite_out = kernels.convert(bits, source, out, target, counts)
    finite, kept = tensor.isfinite(), tensor.to(oracle.DTYPES[target]).isfinite()
    assert kernels.all_finite(bits, source) == finite.all().item()
    if finite.all():
        assert kernels.all_finite(out, target) == finite_out == kept.all().item()
    if clamp:
        kernels.clamp(out, target)
    want = oracle.convert(tensor, oracle.DTYPES[target], clamp)
    assert torch.equal(oracle.bits(tensor_of(out, target))[finite], oracle.bits(want)[finite])
    if finite.all():
        changed = (want.double() != tensor.double()).sum().item()
        zeroed = ((want == 0) & (tensor != 0)).sum().item()
        assert counts.tolist() == [7 + changed, 8 + zeroed]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("target", ["F16", "BF16", "F32"])
def test_convert_every_16_bit_value(source, target):
    """All 65536 patterns, all finite ones, and the finite ones clamped."""
    every = tensor_of(np.arange(65536, dtype=np.uint16), source)
    expect_conversion(every, source, target, False)
    for clamp in (False, True):
        expect_conversion(every[every.isfinite()], source, target, clamp)


@pytest.mark.parametrize("target", first_quick("F16", "BF16"))
def test_convert_float32_around_every_16_bit_value(target):
    """Every 16-bit value, the halfway points between neighbours and the float32 numbers next to those."""
    every = tensor_of(np.arange(65536, dtype=np.uint16), target)
    every = torch.cat([every[every.isfinite()], torch.tensor([65519.0, 65520.0, 3.3895e38]).to(every.dtype)])
    exact = torch.sort(every.float()).values
    middle = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    points = torch.cat([exact, middle, torch.tensor([65519.996, 65520.0, 1e-45, -1e-45, 2.0**-25, 3.4e38])])
    nearby = [points, points.nextafter(torch.tensor(1e30)), points.nextafter(torch.tensor(-1e30))]
    for clamp in (False, True):
        expect_conversion(torch.cat(nearby).clamp(-3.4e38, 3.4e38), "F32", target, clamp)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, target", [("F16", "F16"), ("BF16", "F16"), ("F32", "F16"), ("F32", "BF16"), ("F32", "F32")]
)
def test_subtract_is_the_oracles(source, target):
    """Fine-tuned in `source`, base in `target`, over values of every size."""
    finetuned = vectors_of("bits", 1, 20_000, source)[0].clamp(-30_000, 30_000)
    base = vectors_of("bits", 1, 20_000, target, 1)[0].clamp(-30_000, 30_000)
    finetuned[:99] = base[:99].to(finetuned.dtype)  # some differences are zero
    out = np.empty(20_000, UNSIGNED[target])
    left, right = (bits_of(finetuned, source), source), (bits_of(base, target), target)
    differs = np.array([5])
    assert kernels.subtract(*left, *right, out, target, differs)
    want = oracle.extract(finetuned, base, oracle.DTYPES[target])
    assert oracle.same(tensor_of(out, target), want)
    assert differs - 5 == int((want != 0).sum()) < 20_000


@pytest.mark.parametrize("code", first_quick("F16", "BF16", "F32"))
def test_results_are_the_oracles(code):
    """Both save formats, with and without rescale; negative zeros stay where the rule says so."""
    limit = 15_000 if code == "F16" else 1e37
    base, vector = (v.clamp(-limit, limit) for v in vectors_of("bits", 2, 5000, code))
    base[:4] = torch.tensor([-0.0, -0.0, 0.0, 1.0])
    vector[:4] = torch.tensor([-0.0, 0.0, -0.0, -0.0])
    mask = np.random.default_rng(0).random(5000) < 0.4
    mask[:4] = True
    for density in (1.0, 0.4, 1 / 3):
        scale = torch.tensor(1 / density, dtype=torch.float32)
        args = bits_of(vector, code), code, mask.view(np.uint8), 1 / density
        out = np.empty(5000, UNSIGNED[code])
        assert kernels.add_kept(out, bits_of(base, code), code, *args)
        assert oracle.same(tensor_of(out, code), oracle.model_tensor(base, vector, mask.tolist(), scale))
        assert kernels.keep_vector(out, *args)
        assert oracle.same(tensor_of(out, code), oracle.vector_tensor(vector, mask.tolist(), scale))
    dropped = ~torch.from_numpy(mask)
    assert not oracle.bits(tensor_of(out, code))[dropped].any()  # +0.0, not -0.0


@pytest.mark.parametrize("code", first_quick("F16", "BF16", "F32"))
def test_what_is_not_finite_is_seen(code):
    """A single NaN or infinity of either sign, at either end of an array; the largest finite value is none."""
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for at in (0, 4999):
            tensor = torch.full((5000,), torch.finfo(oracle.DTYPES[code]).max, dtype=oracle.DTYPES[code])
            assert kernels.all_finite(bits_of(tensor, code), code)
            tensor[at] = bad
            assert not kernels.all_finite(bits_of(tensor, code), code)


@pytest.mark.parametrize(
    "code, patterns",
    first_quick(
        ("F16", (0x7C00, 0xFC00, 0x7C01, 0x7FFF, 0xFFFF)),
        ("BF16", (0x7F80, 0xFF80, 0x7F81, 0x7FFF, 0xFFFF)),
        ("F32", (0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)),
    ),
)
@pytest.mark.parametrize("dtype", first_quick(*oracle.DTYPES))
def test_no_nan_gets_through(code, patterns, dtype):
    """Infinities, and NaNs of the smallest and largest payload, of either sign, through all that checks its result."""
    for pattern in patterns:
        bits = np.full(70, 0x3C00, UNSIGNED[code])
        bits[65] = pattern
        mask, zeros = np.ones((1, 70), np.uint8), np.zeros(70, UNSIGNED[code])
        out = np.empty(70, UNSIGNED[dtype])
        assert not kernels.convert(bits, code, out, dtype)
        for left, right in ((bits, zeros), (zeros, bits), (bits, bits)):
            assert not kernels.subtract(left, code, right, code, out, dtype)
        out = np.empty(70, UNSIGNED[code])
        assert not kernels.add_kept(out, bits, code, zeros, code, mask[0], 1.0)
        assert not kernels.add_kept(out, bits, code, bits, code, 1 - mask[0], 1.0)
        assert not kernels.add_kept(out, zeros, code, bits, code, mask[0], 1.0)
        assert not kernels.keep_vector(out, bits, code, mask[0], 1.0)
        assert not kernels.tally(bits, code, 1 - mask, 0, 0, 4, new_counts(1))


@pytest.mark.slow
@pytest.mark.parametrize("code", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("m, steps", [(7, 1000), (256, 4096), (5000, 3001), (20_000, 9002)])
def test_tally(code, m, steps):
    """Sums of squares to six digits, over large and small values; counts per group of m and of what two masks keep."""
    extremes = torch.tensor([300.0, -1e-4] if code == "F16" else [3e25, -1e-25]).to(oracle.DTYPES[code])
    vectors = [torch.cat([vector, extremes]) for vector in vectors_of("steps", 2, 9000, code)]
    masks, counts = np.random.default_rng(1).random((2, 9002)) < [[0.3], [0.6]], new_counts(2)
    for start in range(0, 9002, steps):
        part = slice(start, start + steps)
        for j, vector in enumerate(vectors):
            bits = bits_of(vector, code)[part]
            assert kernels.tally(bits, code, masks.view(np.uint8)[:, part], j, start, m, counts)
    for j, tally in enumerate(tallies(counts, 9002)):
        squares = vectors[j].double().numpy() ** 2
        groups = np.add.reduceat(masks[j], range(0, 9002, m), dtype=int)
        whole = groups[: 9002 // m]
        assert (tally.energy_kept, tally.energy) == pytest.approx((squares[masks[j]].sum(), squares.sum()), rel=1e-6)
        assert (tally.groups, tally.squares) == (len(whole), (whole**2).sum())
        assert (tally.tail, tally.kept_in_groups) == (sum(groups[len(whole) :]), whole.sum())
        assert (tally.numel, tally.nonzero, tally.kept) == (9002, (squares != 0).sum(), masks[j].sum())
        assert tally.both[1 - j] == (masks[0] & masks[1]).sum() and tally.either[1 - j] == (masks[0] | masks[1]).sum()
