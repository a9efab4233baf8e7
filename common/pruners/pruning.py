"""The ranking rule: which positions each vector keeps.

One rule for everything that ranks. Within a scope, order the positions by (1) fewest earlier vectors that
already kept this position, when conflict-aware; (2) larger magnitude; (3) lower flat index. Keep the first k.

  nm         scope: each run of m consecutive elements of the flattened tensor, k = n (CABS, section 3)
  magnitude  scope: the tensor, k = round(density * numel)
  random     each position with probability density, from a counter-based generator

Nothing here knows files or devices: vectors come from a `read` function, arithmetic from an engine
(common.pruners.kernels, or common.pruners.kernels.torch_engine, which give the same bits).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import xxhash

from common.pruners.thresholds import Scope, blocks, rank_in_order


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


def masks_by_block(
    pruning: Pruning,
    name: str,
    dtypes: list[str],
    numel: int,
    read: Callable,
    engine,
    block: int | None = None,
    peek: Callable | None = None,
) -> Iterator[tuple]:
    """(start, stop, vectors' bits, their masks uint8 [stop - start]) of one tensor's blocks, in order.

    name: what random masks are drawn under. read(j, start, stop) -> bits of vector j's elements, a buffer that
    holds until the next call with this j; so do the masks. peek (default: read) does the same for small parts from all over
    the tensor. Masks do not depend on `block` (elements; default: the engine's).
    """
    block = block or engine.BLOCK
    unit = pruning.m if pruning.method == "nm" else 4  # of random numbers four come at a time
    step = max(block // unit, 1) * unit
    if in_passes(pruning, block):
        masks = engine.empty_masks(len(dtypes), min(block, numel))
        for scope in scopes(pruning, numel):
            ranking = Scope(*scope, dtypes, pruning.conflict_aware, engine, masks)
            yield from ranking.masks_by_block(read, peek or read, block)
        return

    masks = engine.empty_masks(len(dtypes), min(step, numel))
    limits = random_limits(pruning.density, len(dtypes), pruning.conflict_aware)
    keys = [random_key(pruning, j, name) for j in range(len(dtypes))]
    for start, stop in blocks(0, numel, step):

        def rank(j, mask, bits, taken, levels, start=start):
            if pruning.method == "nm":
                engine.nm_mask(mask, bits, dtypes[j], taken, levels, pruning.n, pruning.m)
            else:
                engine.random_mask(mask, start, keys[j], taken, limits[j])

        vectors = [read(j, start, stop) for j in range(len(dtypes))]
        found = [mask[: stop - start] for mask in masks]
        rank_in_order(found, vectors, pruning.conflict_aware, rank)
        if pruning.method == "random":  # after the draws, which depend on no value
            for mask, bits, dtype in zip(found, vectors, dtypes, strict=True):
                engine.drop_zeros(mask, bits, dtype)
        yield start, stop, vectors, found
