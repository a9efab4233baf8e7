"""Ranking in a scope that is larger than a block: read it twice, once to find the threshold, once to apply it.

A sample says between which keys the threshold most likely is. The first pass counts only the keys in there, one by
one, and how many are above; if the k-th largest is not among them, there is another pass where it must be.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.pruners.order import in_order
from common.shards.blocks import blocks

_PIECES, _PIECE = 16, 2048  # a sample: so many pieces, evenly spaced, of so many elements
# Keys are counted in at most so many bins. A sample's bracket holds 300,000 float32 keys of normal values, and over
# twice as many where tails are as heavy as Cauchy's: with a bin for each the first pass over a large scope finds the
# threshold itself; in a small one that many would cost more than another pass. All vectors that share a pass have room
# for so many together.
_BINS, _LARGE_BINS, _LARGE = 1 << 16, 1 << 20, 1 << 22
_ROW = 1024  # bins
_ERRORS = 3  # standard errors to either side of where a sample puts the threshold


@dataclass(frozen=True)
class Threshold:
    """Keys above `least` are kept, and the first `ties` of those that equal it; zeros never."""

    least: int
    ties: int


def bracket(sample: np.ndarray, share: float, top: int) -> tuple[int, int]:
    """(low, high): the threshold that a `share` of all keys passes is most likely at least low and below high.

    sample: keys [pieces, size], all below `top`. How far the pieces differ says how far all keys may be from them.
    """
    ranked = np.sort(sample.astype(np.min_scalar_type(top - 1)), axis=None)[::-1]  # narrow keys sort faster
    at = min(int(share * ranked.size), ranked.size - 1)
    error = (sample >= ranked[at]).mean(axis=1).std() / len(sample) ** 0.5
    reach = int(_ERRORS * error * ranked.size) + 1
    low = ranked[at + reach] if at + reach < ranked.size else 0
    high = int(ranked[at - reach]) + 1 if at >= reach else top
    return int(low), high


class Search:
    """For the threshold that exactly k keys pass, all of them below `top`; low:high is where to look first.

        while search.threshold is None:
            counts = …       # int64 [search.bins]: how many keys from `low` to below `high`, in bins of 2**shift keys
            above = …        # how many keys are `high` and more
            search.narrow(counts, above)

    The bins are at most `most`.
    """

    def __init__(self, k: int, low: int, high: int, top: int, most: int = _BINS):
        self._k, self._top, self._most = k, top, most
        self.threshold = None if k else Threshold(top - 1, 0)
        self._look(low, high)

    def _look(self, low: int, high: int) -> None:
        self.low, self.high, self.shift = low, high, ((high - low - 1) // self._most).bit_length()
        self.bins = (high - low - 1 >> self.shift) + 1

    def narrow(self, counts: np.ndarray, above: int) -> None:
        """Look where the counts say that the threshold must be, or find it."""
        rank = self._k - above
        if rank <= 0:
            self._look(self.high, self._top)
        elif rank > counts.sum():
            self._look(0, self.low)
        else:
            number, before = _bin_of(counts, rank)
            low = self.low + (number << self.shift)
            if self.shift == 0:
                self.threshold = Threshold(low, rank - before)
            else:
                self._look(low, min(low + (1 << self.shift), self.high))


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """(the bin that holds the key of this rank, counted down from 1 in the last bin; how many keys are in later bins).

    _bin_of([5, 0, 2, 1], 3) -> (2, 1). By rows first: running sums of a million bins take tens of milliseconds.
    """
    row, before = _last_to_reach(np.add.reduceat(counts, np.arange(0, counts.size, _ROW)), rank)
    number, more = _last_to_reach(counts[row * _ROW : (row + 1) * _ROW], rank - before)
    return row * _ROW + number, before + more


def _last_to_reach(counts: np.ndarray, rank: int) -> tuple[int, int]:
    reached = np.cumsum(counts[::-1])[::-1]  # from each on
    number = int(np.flatnonzero(reached >= rank)[-1])
    return number, int(reached[number] - counts[number])


def _that_fit(searches: dict[int, Search]) -> dict[int, Search]:
    """The first of these searches whose bins fit into the room for all of them, one at least."""
    chosen, room = {}, _LARGE_BINS
    for j, search in searches.items():
        room -= search.bins
        if chosen and room < 0:
            break
        chosen[j] = search
    return chosen


class Scope:
    """Elements start:stop of all vectors, of vector j of which the ks[j] that rank first are kept.

    find() reads the vectors, in passes; from then on fill() makes the masks of consecutive blocks, from the first on.
    """

    def __init__(self, start: int, stop: int, ks: list[int], dtypes: list[str], conflict_aware: bool, engine):
        self.start, self.stop, self._ks = start, stop, ks
        self._dtypes, self._conflict_aware, self._engine = dtypes, conflict_aware, engine
        self.thresholds: list[Threshold] = []
        # Of each vector, int64 [1], how many positions equal to its threshold are still to be kept.
        self._ties: list[np.ndarray] = []

    def find(self, scan: Callable, peek: Callable, step: int) -> None:
        """Find every vector's threshold.

        scan(which, spans, do): do(engine, start, bits of each vector of `which`) for every block, blocks of `step`
        elements in order; peek(j, start, stop) -> bits of vector j, a small part from anywhere. The threshold search
        decides what is read, and how often: hence callbacks. Vectors that do not depend on each other share a pass.
        """
        # Conflict-aware, one by one: a search needs all earlier thresholds, and a pass uses up the ties at them; two
        # searches in one pass would count those twice.
        together = 1 if self._conflict_aware else len(self._ks)
        for first in range(0, len(self._ks), together):
            searches = {j: self._search(j, peek, step) for j in range(first, first + together)}
            while chosen := _that_fit({j: search for j, search in searches.items() if search.threshold is None}):
                self._count(chosen, scan, step)
            self.thresholds += [search.threshold for search in searches.values()]
        self.rewind()

    def rewind(self) -> None:
        """Before the first block again: all ties are still to be kept."""
        self._ties = [np.array([threshold.ties]) for threshold in self.thresholds]

    def fill(self, masks: list, vectors: list, engine) -> None:
        """The masks of the next block of as many vectors as are given."""
        for j, mask, taken, levels in in_order(masks, self._conflict_aware, engine):
            self._keep(j, mask, vectors[j], taken, levels, engine)

    def _keep(self, j: int, mask, bits, taken, levels: int, engine) -> None:
        least, ties = self.thresholds[j].least, self._ties[j]
        engine.threshold_mask(mask, bits, self._dtypes[j], taken, levels, least, ties)

    def _earlier(self, j: int) -> range:
        """Up to vector j itself, the vectors on which its ranking depends."""
        return range(0 if self._conflict_aware else j, j + 1)

    def _ranked(self, j: int, vectors: list, engine) -> tuple:
        """What ranks vector j's elements of a block: (bits, dtype, taken, levels), as the engine takes them.

        vectors: the block of each of those that _earlier() says.
        """
        masks = engine.empty_masks(len(vectors), len(vectors[0]))
        for i, mask, taken, levels in in_order(list(masks), self._conflict_aware, engine):
            if i + 1 < len(vectors):
                self._keep(i, mask, vectors[i], taken, levels, engine)
        return vectors[-1], self._dtypes[j], taken, levels

    def _sample(self, j: int, peek: Callable, size: int) -> np.ndarray:
        """Keys [pieces, size] of vector j, from all over the scope."""
        keys = []
        for start in np.linspace(self.start, self.stop - size, _PIECES).astype(int).tolist():
            vectors = [peek(i, start, start + size) for i in self._earlier(j)]
            self.rewind()  # a piece by itself: where it is, ties of earlier thresholds may be used up or not
            keys.append(self._engine.keys_of(*self._ranked(j, vectors, self._engine)))
        return np.stack(keys)

    def _search(self, j: int, peek: Callable, step: int) -> Search:
        levels = j if self._conflict_aware else 0
        size, k = self.stop - self.start, self._ks[j]
        # Keys are magnitudes below and, above them, how few earlier vectors kept the position: see kernels/ranking.py.
        top = 1 << self._engine.MAGNITUDE_BITS[self._dtypes[j]] + levels.bit_length()
        guess = 0, top
        if k and size > 16 * _PIECES * _PIECE:  # large enough for a sample to be cheap
            guess = bracket(self._sample(j, peek, min(_PIECE, step)), k / size, top)
        return Search(k, *guess, top, _LARGE_BINS if size >= _LARGE else _BINS)

    def _count(self, searches: dict[int, Search], scan: Callable, step: int) -> None:
        """One pass for the searches of these vectors."""
        which = sorted({i for j in searches for i in self._earlier(j)})
        counts = {j: (np.zeros(search.bins, np.int64), np.zeros(1, np.int64)) for j, search in searches.items()}

        def do(engine, _, vectors):
            block = dict(zip(which, vectors, strict=True))
            for j, search in searches.items():
                ranked = self._ranked(j, [block[i] for i in self._earlier(j)], engine)
                engine.count_keys(*counts[j], *ranked, search.low, search.high, search.shift)

        self.rewind()
        scan(which, blocks(self.stop, step, self.start), do)
        for j, search in searches.items():
            in_bins, above = counts[j]
            search.narrow(in_bins, int(above[0]))
