"""The ranking rule: which positions each vector keeps.

One rule for everything that ranks. Within a scope, order the positions by (1) fewest earlier vectors that
already kept this position, when conflict-aware; (2) larger magnitude; (3) lower flat index. Keep the first k.

  nm         scope: each run of m consecutive elements of the flattened tensor, k = n (CABS, section 3)
  magnitude  scope: the tensor, k = round(density * numel)
  random     each position with probability density, from a counter-based generator

Nothing here knows files or devices: vectors come from a `read` function, arithmetic from an engine
(common.kernels, or common.torch_kernels, which give the same bits).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import xxhash


@dataclass(frozen=True)
class Pruning:
    """What to keep. `density` is the fraction kept; n and m count for nm (and m for the report)."""

    method: str
    density: float
    n: int = 64
    m: int = 256
    seed: int = 0
    conflict_aware: bool = True
    rescale: bool = False

    @property
    def scale(self) -> float:
        """What kept values are multiplied by, 1/density with rescale (DARE); used as a float32."""
        return 1.0 / self.density if self.rescale else 1.0


@dataclass(frozen=True)
class Threshold:
    """Keys above `least` are kept, and the first `ties` of those that equal it."""

    least: int
    ties: int


def scopes(pruning: Pruning, numel: int) -> list[tuple[int, int, int]]:
    """[(start, stop, k)] for the methods that rank; a last run of r < m keeps ceil(n*r/m).

    scopes(Pruning("nm", 0.25, n=1, m=4), 6) -> [(0, 4, 1), (4, 6, 1)]
    """
    if pruning.method == "magnitude":
        return [(0, numel, round(pruning.density * numel))]
    starts = range(0, numel, pruning.m)
    sizes = ((start, min(pruning.m, numel - start)) for start in starts)
    return [(start, start + size, -(-pruning.n * size // pruning.m)) for start, size in sizes]


def in_passes(pruning: Pruning, block: int) -> bool:
    """Whether a scope is larger than a block of so many elements, and is gone through several times."""
    return pruning.method == "magnitude" or (pruning.method == "nm" and pruning.m > 2 * block)


def random_key(pruning: Pruning, position: int, name: str) -> int:
    """The 64-bit generator key of one tensor of the vector at `position` in the order."""
    return xxhash.xxh3_64(f"{pruning.seed}/{position}/{name}".encode()).intdigest()


def random_limits(density: float, vectors: int, conflict_aware: bool) -> list[list[int]]:
    """For each vector, by how many earlier vectors kept a position: keep it if its draw is below this (of 2**32).

    Conflict-aware, a vector takes what no earlier one kept first, and more contested positions only when
    those run out; the probabilities are exact fractions that give every vector the expected density.
    random_limits(0.5, 2, True) -> [[2**31], [2**32, 0]]
    """
    density = Fraction(density)
    if not conflict_aware:
        return [[round(density * 2**32)]] * vectors
    shares, limits = [Fraction(1)], []  # shares[c]: expected fraction of positions kept by c earlier vectors
    for _ in range(vectors):
        left, odds = density, []
        for share in shares:
            odds.append(min(Fraction(1), left / share) if share else Fraction(0))
            left -= odds[-1] * share
        limits.append([round(p * 2**32) for p in odds])
        moved = [share * p for share, p in zip(shares, odds, strict=True)]
        stay = [share - up for share, up in zip(shares, moved, strict=True)]
        shares = [a + b for a, b in zip([*stay, Fraction(0)], [Fraction(0), *moved], strict=True)]
    return limits


def _rank_in_order(masks, vectors: list, conflict_aware: bool, rank: Callable) -> None:
    """Fill the masks of one block, vector by vector: rank(j, mask, bits, taken, levels) fills that of vector j."""
    taken = None
    for j, bits in enumerate(vectors):
        rank(j, masks[j], bits, taken, j if conflict_aware else 0)
        if conflict_aware and j + 1 < len(vectors):
            taken = masks[j] if taken is None else taken + masks[j]


def _blocks(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + step, stop)) for at in range(start, stop, step))


def _digits(magnitude_bits: int, levels: int) -> list[tuple[int, int]]:
    """[(shift, width)] of the digits of a key, from the top: as many as keep the counts small."""
    total = magnitude_bits + levels.bit_length()
    return [(0, total)] if magnitude_bits == 15 else [(15, total - 15), (0, 15)]


def _next_digit(counts, k: int) -> tuple[int, int]:
    """(the digit the k-th largest key has, how many keys with that digit are among the k)."""
    for digit in range(len(counts) - 1, -1, -1):
        if counts[digit] >= k:
            return digit, k
        k -= int(counts[digit])
    raise AssertionError("k exceeds the scope")


def _find_threshold(blocks: list, k: int, count: Callable, digits: list[tuple[int, int]]) -> Threshold:
    """The threshold that k keys of the scope pass. count(counts, block, shift, width, prefix) adds to a digit's counts."""
    if k == 0:
        return Threshold((1 << sum(digits[0])) - 1, 0)
    prefix = 0
    for shift, width in digits:
        counts = np.zeros((2, 1 << width), np.int64)  # in two banks, see count_digits
        for block in blocks:
            count(counts, block, shift, width, prefix)
        digit, k = _next_digit(counts.sum(axis=0), k)
        prefix = prefix << width | digit
    return Threshold(prefix, k)


def _scope_masks(pruning, dtypes, scope, read, engine, masks, step) -> Iterator[tuple]:
    """The blocks of one scope: find each vector's threshold in passes over it, then apply them in one more."""
    start, stop, k = scope
    blocks = list(_blocks(start, stop, step))
    thresholds: list[Threshold] = []

    def masks_of(vectors: list, ties: list[int]):
        found = [mask[: len(bits)] for mask, bits in zip(masks, vectors, strict=False)]

        def rank(j, mask, bits, taken, levels):
            ties[j] -= engine.threshold_mask(
                mask, bits, dtypes[j], taken, levels, thresholds[j].least, ties[j]
            )

        _rank_in_order(found, vectors, pruning.conflict_aware, rank)
        return found

    for j, dtype in enumerate(dtypes):
        levels = j if pruning.conflict_aware else 0
        ties = {}

        def count(counts, block, shift, width, prefix, j=j, dtype=dtype, levels=levels, ties=ties):
            taken = None
            if levels:
                if block[0] == start:
                    ties[j] = [threshold.ties for threshold in thresholds]
                taken = sum(masks_of([read(i, *block) for i in range(j)], ties[j]))
            engine.count_digits(counts, read(j, *block), dtype, taken, levels, shift, width, prefix)

        digits = _digits(engine.MAGNITUDE_BITS[dtype], levels)
        thresholds.append(_find_threshold(blocks, k, count, digits))
    ties = [threshold.ties for threshold in thresholds]
    for block in blocks:
        vectors = [read(j, *block) for j in range(len(dtypes))]
        yield *block, vectors, masks_of(vectors, ties)


def masks_by_block(
    pruning: Pruning,
    name: str,
    dtypes: list[str],
    numel: int,
    read: Callable,
    engine,
    block: int | None = None,
) -> Iterator[tuple]:
    """(start, stop, vectors' bits, their masks uint8 [stop - start]) of one tensor's blocks, in order.

    name: what random masks are drawn under. read(j, start, stop) -> bits of vector j's elements, a buffer that
    holds until the next call with this j; so do the masks. Masks do not depend on `block` (elements; default: the
    engine's).
    """
    block = block or engine.BLOCK
    unit = pruning.m if pruning.method == "nm" else 4  # of random numbers four come at a time
    step = max(block // unit, 1) * unit
    if in_passes(pruning, block):
        masks = engine.empty_masks(len(dtypes), min(block, numel))
        for scope in scopes(pruning, numel):
            yield from _scope_masks(pruning, dtypes, scope, read, engine, masks, block)
        return

    masks = engine.empty_masks(len(dtypes), min(step, numel))
    limits = random_limits(pruning.density, len(dtypes), pruning.conflict_aware)
    keys = [random_key(pruning, j, name) for j in range(len(dtypes))]
    for start, stop in _blocks(0, numel, step):

        def rank(j, mask, bits, taken, levels, start=start):
            if pruning.method == "nm":
                engine.nm_mask(mask, bits, dtypes[j], taken, levels, pruning.n, pruning.m)
            else:
                engine.random_mask(mask, start, keys[j], taken, limits[j])

        vectors = [read(j, start, stop) for j in range(len(dtypes))]
        found = [mask[: stop - start] for mask in masks]
        _rank_in_order(found, vectors, pruning.conflict_aware, rank)
        yield start, stop, vectors, found
