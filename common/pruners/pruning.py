"""The ranking rule: which positions each vector keeps.

One rule for everything that ranks. Within a scope, order the positions by (1) fewest earlier vectors that
already kept this position, when conflict-aware; (2) larger magnitude; (3) lower flat index. Keep the first k, but for
those whose value is zero: they change nothing, so they are not part of the mask and in no later vector's way.

  nm         scope: each group of m consecutive elements of the flattened tensor, k = n (CABS, section 3)
  magnitude  scope: the tensor, k = round(density * numel)
  random     each position with probability density, from a counter-based generator

Numbers only: nothing here touches an array. masks.py applies the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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


def scopes(pruning: Pruning, numel: int) -> list[tuple[int, int, int]]:
    """[(start, stop, k)] for the methods that rank; a last group of r < m elements keeps ceil(n*r/m).

    scopes(Pruning("nm", 0.25, n=1, m=4), 6) -> [(0, 4, 1), (4, 6, 1)]
    """
    if pruning.method == "magnitude":
        return [(0, numel, round(pruning.density * numel))]
    starts = range(0, numel, pruning.m)
    sizes = ((start, min(pruning.m, numel - start)) for start in starts)
    return [(start, start + size, -(-pruning.n * size // pruning.m)) for start, size in sizes]


def in_passes(pruning: Pruning, block: int) -> bool:
    """Whether a scope is larger than a block of so many elements, and is read several times."""
    # Up to two blocks a block grows to a whole group instead, which costs less than reading everything twice.
    return pruning.method == "magnitude" or (pruning.method == "nm" and pruning.m > 2 * block)


def random_key(pruning: Pruning, position: int, name: str) -> int:
    """The 64-bit generator key of one tensor of the vector at `position` in the order."""
    return xxhash.xxh3_64(f"{pruning.seed}/{position}/{name}".encode()).intdigest()


def random_limits(densities: Sequence[float], conflict_aware: bool) -> list[list[int]]:
    """For each vector, by how many earlier vectors kept a position: keep it if its draw is below this (of 2**32).

    Conflict-aware, a vector takes what no earlier one kept first, and more contested positions only when those run
    out; the probabilities are exact fractions that give every vector its expected density.
    random_limits([0.5, 0.5], True) -> [[2**31], [2**32, 0]]
    """
    if not conflict_aware:
        return [[round(Fraction(density) * 2**32)] for density in densities]
    shares, limits = [Fraction(1)], []  # shares[c]: expected fraction of positions kept by c earlier vectors
    for density in densities:
        left, odds = Fraction(density), []
        for share in shares:
            odds.append(min(Fraction(1), left / share) if share else Fraction(0))
            left -= odds[-1] * share
        limits.append([round(p * 2**32) for p in odds])
        taken = [share * p for share, p in zip(shares, odds, strict=True)]
        free = [share - up for share, up in zip(shares, taken, strict=True)]
        shares = [a + b for a, b in zip([*free, Fraction(0)], [Fraction(0), *taken], strict=True)]
    return limits
