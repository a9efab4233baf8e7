"""Sums of streamed merges: every bit against a slow oracle, and against mergekit itself."""

from fractions import Fraction

import merge_oracle as oracle
import numpy as np
import pytest
import torch
from conftest import first_quick
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_tensors

from common.pruners import kernels
from merge_and_evaluate import sums
from merge_and_evaluate.budgets import add_norms, empty_norms, rescale_factor, ties_budget
from merge_and_evaluate.sum_inputs import Block, Rule, sum_of_weights

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
CODES = list(TORCH)
BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}


def block(tensor: torch.Tensor) -> Block:
    """A torch tensor's bits."""
    code = next(code for code, dtype in TORCH.items() if dtype == tensor.dtype)
    signed = torch.int32 if code == "F32" else torch.int16
    return Block(tensor.flatten().view(signed).numpy().view(BITS[code]), code)


def empty(numel: int, dtype: str) -> Block:
    return Block(np.full(numel, 0xABC, BITS[dtype]), dtype)


def values(some: Block) -> list:
    return oracle.to_values(some.bits, some.dtype)


def numbers(numel: int, dtype: str, seed: int) -> torch.Tensor:
    """Values over many magnitudes, with zeros of both signs, ties and numbers below the least normal one."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(numel, generator=generator)
    out = torch.where(torch.rand(numel, generator=generator) < 0.3, (out * 4).round() / 4, out)
    out = torch.where(torch.rand(numel, generator=generator) < 0.1, out * 1e-7, out)
    zeros = torch.rand(numel, generator=generator) < 0.1
    return torch.where(zeros, torch.copysign(torch.zeros(numel), out), out).to(TORCH[dtype])


def models_near(base: torch.Tensor, dtypes: list[str], seed: int) -> list[torch.Tensor]:
    """Models around a base: in a third of the places equal to it, elsewhere near or far."""
    found = []
    for j, dtype in enumerate(dtypes):
        noise = numbers(base.numel(), "F32", seed + 100 * j + 1)
        same = torch.rand(base.numel(), generator=torch.Generator().manual_seed(seed + j)) < 0.3
        found.append(torch.where(same, base.float(), base.float() + noise / 16).to(TORCH[dtype]))
    return found


def expect(out: Block, wanted: list, code: str) -> None:
    bits = [oracle.to_bits(value, code) for value in wanted]
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(out.bits.tolist(), bits, strict=True)) if a != b]
    assert not wrong, wrong[:5]


def fits(wanted: list, code: str) -> bool:
    """Whether every value is finite once written."""
    return bool(torch.isfinite(torch.tensor([float(value) for value in wanted]).to(TORCH[code])).all())


def by_mergekit(method: str, base, models, out: str, **parameters) -> torch.Tensor:
    """mergekit's own result for a recipe with `dtype: float32`; base None: no base_model."""
    tensors = [*models, *([] if base is None else [base])]
    index = None if base is None else len(models)
    merged = merge_tensors(
        tensors, method, parameters=parameters, base_index=index, dtype=torch.float32, out_dtype=TORCH[out]
    )
    return merged


def same_but_for_zeros(ours: Block, theirs: torch.Tensor, base: torch.Tensor) -> None:
    """Bit for bit, but for a base of -0.0 that nothing changes, which mergekit makes +0.0."""
    theirs = block(theirs).bits
    differ = np.nonzero(ours.bits != theirs)[0]
    minus_zero = (base == 0) & torch.signbit(base)
    assert all(minus_zero[i] and theirs[i] == 0 for i in differ), differ[:5]


WEIGHTS = st.lists(
    st.one_of(st.sampled_from([1.0, 0.5, -0.4, 1.2, 0.0]), st.floats(-2, 2, width=32)), min_size=1, max_size=5
)
SIZES = st.integers(1, 75)
COMMON = {
    "numel": SIZES,
    "weights": WEIGHTS,
    "dtypes": st.tuples(st.sampled_from(CODES), st.sampled_from(CODES), st.sampled_from(CODES)),
    "seed": st.integers(0, 10**6),
}


def inputs(numel, weights, dtypes, seed):
    """(base, models alternating between two dtypes, code to write)"""
    base = numbers(numel, dtypes[0], seed)
    return base, models_near(base, [dtypes[j % 2] for j in range(len(weights))], seed), dtypes[2]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**COMMON, normalize=st.booleans())
@example(numel=75, weights=[0.3, 0.2, 0.7, -0.1, 0.4], dtypes=("F32", "F32", "F32"), seed=1, normalize=True)
def test_linear(numel, weights, dtypes, seed, normalize):
    _, models, code = inputs(numel, weights, dtypes, seed)
    out = empty(numel, code)
    finite = sums.linear(out, [block(model) for model in models], tuple(weights), normalize)
    theirs = by_mergekit("linear", None, models, code, weight=weights, normalize=normalize)
    assert finite == bool(torch.isfinite(theirs).all())
    if finite:
        assert (out.bits == block(theirs).bits).all()
        expect(out, oracle.linear([values(block(model)) for model in models], weights, normalize), code)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(**COMMON, normalize=st.booleans(), scale=st.sampled_from([1.0, 0.3, -1.5]))
@example(numel=75, weights=[0.3, 0.2, 0.7, -0.1, 0.4], dtypes=("F16",) * 3, seed=1, normalize=True, scale=0.3)
@example(numel=7, weights=[0.3, 0.2, 0.7, -0.1, 0.4], dtypes=("F32",) * 3, seed=1, normalize=False, scale=1.0)
@example(numel=9, weights=[1.0, -1.0], dtypes=("F16",) * 3, seed=1, normalize=True, scale=1.0)
def test_task_arithmetic(numel, weights, dtypes, seed, normalize, scale):
    base, models, code = inputs(numel, weights, dtypes, seed)
    out, rule = empty(numel, code), Rule(tuple(weights), normalize, scale)
    finite = sums.delta_sum(out, block(base), [block(model) for model in models], rule, (0, numel))
    theirs = by_mergekit(
        "task_arithmetic", base, models, code, weight=weights, normalize=normalize, **{"lambda": scale}
    )
    assert finite == bool(torch.isfinite(theirs).all())
    if finite:
        same_but_for_zeros(out, theirs, base)
        arguments = (values(block(base)), [values(block(model)) for model in models], weights)
        expect(out, oracle.delta_sum(*arguments, normalize=normalize, scale=scale), code)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(**COMMON, normalize=st.booleans(), int8_mask=st.booleans(), density=st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0]))
@example(numel=70, weights=[1.0] * 5, dtypes=("F32",) * 3, seed=3, normalize=True, int8_mask=False, density=0.8)
def test_ties(numel, weights, dtypes, seed, normalize, int8_mask, density):
    """Where no magnitudes tie at the threshold: mergekit's bits; always: the oracle's."""
    base, models, code = inputs(numel, weights, dtypes, seed)
    deltas = [(model.float() - base.float()).tolist() for model in models]
    masks = [oracle.ties_mask(delta, density) for delta in deltas]
    assert all(sum(mask) == ties_budget(density, numel) for mask in masks)
    out, rule = empty(numel, code), Rule(tuple(weights), normalize, 0.5, elect=True)
    arrays = [np.array(mask, np.uint8) for mask in masks]
    finite = sums.delta_sum(out, block(base), [block(model) for model in models], rule, (0, numel), arrays)
    arguments = (values(block(base)), [values(block(model)) for model in models], weights, masks)
    wanted = oracle.delta_sum(*arguments, normalize=normalize, scale=0.5, elect=True)
    assert finite == fits(wanted, code)
    if not finite:
        return
    expect(out, wanted, code)
    if not any(tied(delta, mask) for delta, mask in zip(deltas, masks, strict=True)):
        parameters = {"density": density, "normalize": normalize, "int8_mask": int8_mask, "lambda": 0.5}
        same_but_for_zeros(out, by_mergekit("ties", base, models, code, weight=weights, **parameters), base)


def tied(delta: list, mask: list[int]) -> bool:
    """Whether a dropped magnitude equals a kept one."""
    kept, dropped = ({abs(x) for x, keep in zip(delta, mask, strict=True) if keep == k and x} for k in (1, 0))
    return bool(kept & dropped)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**COMMON, elect=st.booleans(), rescale=st.booleans())
def test_dare_with_the_masks_that_mergekit_drew(numel, weights, dtypes, seed, elect, rescale):
    base, models, code = inputs(numel, weights, dtypes, seed)
    torch.manual_seed(seed)
    masks = [torch.bernoulli(torch.full((numel,), 0.4)).to(torch.uint8).numpy() for _ in models]
    scales = [factor(block(base), block(model), mask) for model, mask in zip(models, masks, strict=True)]
    rule = Rule(tuple(weights), elect=elect, scales=tuple(scales) if rescale else None)
    out = empty(numel, code)
    finite = sums.delta_sum(out, block(base), [block(model) for model in models], rule, (0, numel), masks)
    torch.manual_seed(seed)
    method = "dare_ties" if elect else "dare_linear"
    theirs = by_mergekit(method, base, models, "F32", weight=weights, density=0.4, rescale=rescale)
    arguments = (values(block(base)), [values(block(model)) for model in models], weights, masks)
    wanted = oracle.delta_sum(*arguments, scales=scales if rescale else None, elect=elect)
    assert finite == fits(wanted, code)
    if not finite:
        return
    expect(out, wanted, code)
    if not rescale:
        same_but_for_zeros(out, theirs.to(TORCH[code]), base)
    elif not elect:  # norms summed in float32 by mergekit: the last bits of the factor differ
        mine = torch.tensor([float(x) for x in values(out)])
        near = 2e-5 * (1 + theirs.abs()) if code == "F32" else 0.02 * (1 + theirs.abs())
        assert ((mine - theirs).abs() <= near).all()


def difference(model: Block, base: Block) -> np.ndarray:
    delta = np.empty(base.bits.size, np.uint32)
    assert kernels.subtract(model.bits, model.dtype, base.bits, base.dtype, delta, "F32")
    return delta


def factor(base: Block, model: Block, mask) -> np.float32:
    norms = empty_norms()
    add_norms(norms, difference(model, base), mask)
    return rescale_factor(norms)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(**COMMON, consensus=st.booleans())
@example(numel=40, weights=[1.0, 1.0, 1.0], dtypes=("F16",) * 3, seed=5, consensus=True)
def test_pruned_vectors(numel, weights, dtypes, seed, consensus):
    base = numbers(numel, dtypes[0], seed)
    vectors = [numbers(numel, dtypes[1], seed + j + 1) for j in range(len(weights))]
    random = np.random.default_rng(seed)
    masks = [(random.random(numel) < 0.4).astype(np.uint8) for _ in vectors]
    out = empty(numel, dtypes[2])
    finite = sums.vector_sum(out, block(base), [block(v) for v in vectors], masks, tuple(weights), consensus)
    wanted = oracle.vector_sum(values(block(base)), [values(block(v)) for v in vectors], masks, weights, consensus)
    assert finite == fits(wanted, dtypes[2])
    if finite:
        expect(out, wanted, dtypes[2])
    if dtypes[0] == dtypes[2]:
        free = ~np.array(masks).any(0)
        assert (out.bits[free] == block(base).bits[free]).all()


def test_consensus_by_hand():
    """0.3, 0.1 and -0.2 kept by three: +, the mean of 0.3 and 0.1. Kept by one: as it is. Opposite equals: the +."""
    rows = [[0.5, -0.5, 1.0, 0.0], [0.25, 0.0, -1.0, 0.0], [-0.25, 0.0, 0.0, 0.0]]
    masks = [np.array(m, np.uint8) for m in ([1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 0])]
    base, out = torch.tensor([1.0, 1.0, 1.0, -0.0]), empty(4, "F32")
    assert sums.vector_sum(out, block(base), [block(torch.tensor(r)) for r in rows], masks, (1.0, 1.0, 1.0), True)
    assert out.bits.view(np.float32).tolist() == [1.375, 0.5, 2.0, 0.0] and np.signbit(out.bits.view(np.float32)[3])


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("cuts", [[0, 1, 5, 40, 4133], [0, 2048, 4133], [0, 4128, 4133]])
def test_no_cut_changes_a_bit(elect, cuts):
    """Five models, whose sum has another order in the tensor's last elements, in blocks of any size."""
    base = numbers(4133, "BF16", 0)
    models = [block(model) for model in models_near(base, ["BF16"] * 5, 7)]
    rule = Rule((0.3, 0.2, 0.7, -0.1, 0.4), True, 0.9, elect)
    whole, parts = empty(4133, "F32"), empty(4133, "F32")
    assert sums.delta_sum(whole, block(base), models, rule, (0, 4133))
    for start, stop in zip(cuts, cuts[1:], strict=False):
        piece = [Block(m.bits[start:stop], m.dtype) for m in [parts, block(base), *models]]
        assert sums.delta_sum(piece[0], piece[1], piece[2:], rule, (start, 4133))
    assert (whole.bits == parts.bits).all()


@pytest.mark.parametrize("shape", [(33, 7), (64, 32), (1000, 301)])
def test_five_models_of_odd_shapes_as_mergekit_stacks_them(shape):
    base = numbers(shape[0] * shape[1], "F16", 1).reshape(shape)
    models = [model.reshape(shape) for model in models_near(base.flatten(), ["F16"] * 5, 2)]
    out, weights = empty(base.numel(), "F32"), [0.3, 0.2, 0.7, -0.1, 0.4]
    assert sums.delta_sum(out, block(base), [block(m) for m in models], Rule(tuple(weights)), (0, base.numel()))
    same_but_for_zeros(out, by_mergekit("task_arithmetic", base, models, "F32", weight=weights), base.flatten())


@pytest.mark.parametrize("count", range(1, 20))
def test_sum_of_weights(count):
    weights = torch.randn(count, generator=torch.Generator().manual_seed(count))
    assert sum_of_weights(tuple(weights.tolist())) == weights[None].sum(dim=1)[0].item()


@pytest.mark.parametrize("code", first_quick(*CODES))
def test_where_nothing_differs_the_base_stays(code):
    """Every pattern of bits there is, both zeros included."""
    bits = np.arange(1 << 16, dtype=np.uint16) if code != "F32" else np.arange(1 << 16, dtype=np.uint32) << 16
    finite = torch.isfinite(torch.from_numpy(bits.view(np.int16 if code != "F32" else np.int32)).view(TORCH[code]))
    base = Block(bits[finite.numpy()].copy(), code)
    out, size = empty(base.bits.size, code), base.bits.size
    assert sums.delta_sum(out, base, [base, base], Rule((1.2, -0.3), True), (0, size))
    assert (out.bits == base.bits).all()


@pytest.mark.parametrize("code", first_quick(*CODES))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_reported(code, bad):
    """In the base, in a model, in the last chunk, where no value agrees with a NaN; and sums that are too large."""
    base, model = numbers(5000, code, 0), numbers(5000, code, 1)
    broken = model.clone()
    broken[4999] = bad
    mask = [np.zeros(5000, np.uint8)]
    out, good, other = empty(5000, code), block(base), block(broken)
    assert not sums.delta_sum(out, good, [other], Rule((1.0,)), (0, 5000))
    assert not sums.delta_sum(out, good, [good, other], Rule((1.0, 1.0), True, elect=True), (0, 5000))
    assert not sums.delta_sum(out, good, [other], Rule((1.0,)), (0, 5000), [1 - mask[0]])
    assert not sums.delta_sum(out, other, [good], Rule((1.0,)), (0, 5000))
    assert not sums.linear(out, [good, other], (0.5, 0.5))
    assert not sums.vector_sum(out, other, [good], mask, (1.0,))
    assert not sums.linear(out, [good, good], (1.0, -1.0))


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_a_sum_too_large_for_what_is_written_is_reported(code):
    large = torch.tensor([3e38 if code == "BF16" else 60000.0]).to(TORCH[code])
    out, wide = empty(1, code), empty(1, "F32")
    assert not sums.linear(out, [block(large)], (1.1365,), normalize=False)
    if code == "F16":
        assert sums.linear(wide, [block(large)], (1.1365,), normalize=False)


@pytest.mark.parametrize("largest", first_quick(1.9, 3e38, 1e-30, 1e-42))
def test_norms_are_exact_and_add_up(largest):
    """Against fractions, in parts and as a whole: numbers of all magnitudes, and 21 000 that are nearly equal."""
    numel = 30_000
    base, model = numbers(numel, "F32", 0), numbers(numel, "F32", 1)
    model[:50] = base[:50] + 1e-44
    base[50:60], model[50:60] = 0.0, 3e-45
    base[9000:], model[9000:] = 0.0, torch.linspace(0.7 * largest, largest, numel - 9000)
    mask = (np.arange(numel) % 3 == 0).astype(np.uint8)
    delta = [Fraction(float(x)) for x in (model - base).abs()]
    norms, bits = empty_norms(), difference(block(model), block(base))
    for part in (slice(2000, numel), slice(0, 2000)):
        add_norms(norms, bits[part], mask[part])
    before, after = (sum(int(n) * Fraction(2) ** (max(e, 1) - 150) for e, n in enumerate(row)) for row in norms)
    assert before == sum(delta) and after == sum(d for d, keep in zip(delta, mask, strict=True) if keep)
    if largest == 1.9:  # at 3e38 the sum is beyond float32
        assert rescale_factor(norms) == np.float32(float(before)) / np.float32(float(after))
    assert rescale_factor(empty_norms()) == 1


@pytest.mark.parametrize("spoilt", [None, 2.0**-25, 0.25, -0.75, 3e38, 1e-45])
def test_norms_of_what_float16_weights_differ_by(spoilt):
    """Multiples of 2**-24 below a quarter are counted in those units; one value of another kind changes no digit."""
    random = np.random.default_rng(0)
    units = random.integers(-(2**22) + 1, 2**22, 9001)
    units[[5, 8500]] = 2**22 - 1, -(2**22) + 1
    units[random.random(9001) < 0.7] >>= 12
    delta, mask = (units * 2.0**-24).astype(np.float32), (random.random(9001) < 0.4).astype(np.uint8)
    assert (delta.astype(float) * 2**24 == units).all()
    if spoilt is not None:
        delta[4500], mask[4500] = spoilt, 1
    norms = empty_norms()
    add_norms(norms, delta.view(np.uint32), mask)
    exact = [Fraction(abs(float(value))) for value in delta]
    before, after = (sum(int(n) * Fraction(2) ** (max(e, 1) - 150) for e, n in enumerate(row)) for row in norms)
    assert before == sum(exact) and after == sum(v for v, keep in zip(exact, mask, strict=True) if keep)


def test_blocks_that_do_not_fit_are_no_blocks():
    four, five = empty(4, "F16"), empty(5, "F16")
    with pytest.raises(ValueError, match="blocks of one size"):
        sums.linear(four, [five], (1.0,))
    with pytest.raises(ValueError, match="contiguous"):
        sums.linear(four, [Block(np.zeros(8, np.uint16)[::2], "F16")], (1.0,))
    with pytest.raises(ValueError, match="blocks of one size"):
        sums.vector_sum(four, four, [four], [np.ones(5, np.uint8)], (1.0,))
