"""Ranking in a scope that is larger than a block: read it twice, once to find the threshold, once to apply it.

A sample says between which keys the threshold most likely lies. The first pass counts only the keys in there, one by
one, and how many lie above; if the k-th largest is not among them, there is another pass where it must be.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_PIECES, _PIECE = 16, 2048  # a sample: so many pieces, evenly spaced, of so many elements
_BINS = 1 << 16  # keys are counted in at most so many bins
_ERRORS = 3  # standard errors to either side of where a sample puts the threshold


@dataclass(frozen=True)
class Threshold:
    """Keys above `least` are kept, and the first `ties` of those that equal it."""

    least: int
    ties: int


def bracket(sample: np.ndarray, share: float, top: int) -> tuple[int, int]:
    """(low, high): the threshold that a `share` of all keys passes is most likely at least low and below high.

    sample: keys [pieces, size], all below `top`. How far the pieces differ says how far the whole may be from them.
    """
    ranked = np.sort(sample.astype(np.min_scalar_type(top - 1)), axis=None)[::-1]  # narrow keys sort faster
    at = min(int(share * ranked.size), ranked.size - 1)
    error = (sample >= ranked[at]).mean(axis=1).std() / len(sample) ** 0.5
    reach = int(_ERRORS * error * ranked.size) + 1
    low = ranked[at + reach] if at + reach < ranked.size else 0
    high = int(ranked[at - reach]) + 1 if at >= reach else top
    return int(low), high


def find_threshold(count: Callable, k: int, low: int, high: int, top: int) -> Threshold:
    """The threshold that exactly k keys pass, all of them below `top`, by counting; low:high is where to look first.

    count(low, high, shift) -> (how many keys lie in each bin of 2**shift keys from `low`, how many are `high` or above).
    """
    if k == 0:
        return Threshold(top - 1, 0)
    while True:
        shift = ((high - low - 1) // _BINS).bit_length()
        counts, above = count(low, high, shift)
        reached = above + np.cumsum(counts[::-1])[::-1]  # keys that reach a bin's least, bin by bin
        if above >= k:
            low, high = high, top
        elif reached[0] < k:
            low, high = 0, low
        else:
            number = int(np.flatnonzero(reached >= k)[-1])
            if shift == 0:
                return Threshold(low + number, k - int(reached[number] - counts[number]))
            low, high = low + (number << shift), min(low + (number + 1 << shift), high)


def rank_in_order(masks, vectors: list, conflict_aware: bool, rank: Callable) -> None:
    """Fill the masks of one block, vector by vector: rank(j, mask, bits, taken, levels) fills that of vector j."""
    taken = None
    for j, bits in enumerate(vectors):
        rank(j, masks[j], bits, taken, j if conflict_aware else 0)
        if conflict_aware and j + 1 < len(vectors):
            taken = masks[j] if taken is None else taken + masks[j]


def blocks(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks: blocks(1, 6, 2) -> (1, 3), (3, 5), (5, 6)."""
    return ((at, min(at + step, stop)) for at in range(start, stop, step))


class Scope:
    """Elements start:stop of all vectors, of each of which the k that rank first are kept.

    read and peek(j, start, stop) -> bits of vector j, in order or, with peek, a small part from anywhere.
    """

    def __init__(self, start: int, stop: int, k: int, dtypes: list[str], conflict_aware: bool, engine, masks):
        self._start, self._stop, self._k = start, stop, k
        self._dtypes, self._conflict_aware, self._engine, self._masks = dtypes, conflict_aware, engine, masks
        self._thresholds: list[Threshold] = []

    def _fill(self, vectors: list, ties: list[int]):
        """The masks of a block of as many vectors as have a threshold; takes what it uses from `ties`."""
        found = [mask[: len(bits)] for mask, bits in zip(self._masks, vectors, strict=False)]

        def rank(j, mask, bits, taken, levels):
            least = self._thresholds[j].least
            ties[j] -= self._engine.threshold_mask(mask, bits, self._dtypes[j], taken, levels, least, ties[j])

        rank_in_order(found, vectors, self._conflict_aware, rank)
        return found

    def _ranked(self, j: int, spans: Iterator[tuple[int, int]], read: Callable) -> Iterator[tuple]:
        """What ranks vector j's elements, span by span: (bits, dtype, taken, levels), as the engine takes them."""
        levels = j if self._conflict_aware else 0
        ties = [threshold.ties for threshold in self._thresholds]
        for span in spans:
            taken = sum(self._fill([read(i, *span) for i in range(j)], ties)) if levels else None
            yield read(j, *span), self._dtypes[j], taken, levels

    def _sample(self, j: int, peek: Callable, size: int) -> np.ndarray:
        """Keys [pieces, size] of vector j, from all over the scope."""
        starts = np.linspace(self._start, self._stop - size, _PIECES).astype(int).tolist()
        spans = ((start, start + size) for start in starts)
        return np.stack([self._engine.keys_of(*ranked) for ranked in self._ranked(j, spans, peek)])

    def _threshold(self, j: int, read: Callable, peek: Callable, step: int) -> Threshold:
        levels = j if self._conflict_aware else 0
        size = self._stop - self._start
        top = 1 << self._engine.MAGNITUDE_BITS[self._dtypes[j]] + levels.bit_length()

        def count(low, high, shift):
            counts, above = np.zeros((2, 1 << (high - low - 1 >> shift).bit_length()), np.int64), 0
            for ranked in self._ranked(j, blocks(self._start, self._stop, step), read):
                above += self._engine.count_keys(counts, *ranked, low, high, shift)
            return counts.sum(axis=0), above

        guess = 0, top
        if self._k and size > 16 * _PIECES * _PIECE:  # large enough for a sample to be cheap
            guess = bracket(self._sample(j, peek, min(_PIECE, step)), self._k / size, top)
        return find_threshold(count, self._k, *guess, top)

    def masks_by_block(self, read: Callable, peek: Callable, step: int) -> Iterator[tuple]:
        """(start, stop, vectors' bits, their masks) of blocks of `step` elements, in order."""
        for j in range(len(self._dtypes)):
            self._thresholds.append(self._threshold(j, read, peek, step))
        ties = [threshold.ties for threshold in self._thresholds]
        for block in blocks(self._start, self._stop, step):
            vectors = [read(j, *block) for j in range(len(self._dtypes))]
            yield *block, vectors, self._fill(vectors, ties)
