"""Masks of one tensor of all vectors, asked for block by block: the ranking rule applied.

Nothing here knows files or devices: bits come from the caller, arithmetic from an engine (kernels.engine).
"""

import math
from collections.abc import Callable, Iterator
from copy import copy

from common.pruners.order import in_order
from common.pruners.pruning import Pruning, in_passes, random_key, random_limits, scopes
from common.pruners.thresholds import Scope, Threshold
from common.shards.blocks import blocks

# Groups of a small m are ranked so many side by side (_SIDE_BY_SIDE in kernels/ranking.py): a block that is no multiple
# leaves the rest to a slower kernel. Only while that is at most _SMALL elements.
_GROUPS, _SMALL = 128, 1 << 14
_DRAWS = 32  # four random numbers come at a time, and a packed mask has a bit for each of 32


class Masks:
    """Which positions each vector keeps of one tensor.

        masks = Masks(prunings, name, dtypes, numel, engine)
        if masks.in_passes:                              # a scope is larger than a block: find its thresholds first
            masks.find_thresholds(masks.scanning(read), peek)
        for start, stop in masks.blocks():               # in order, every block once
            kept = masks.of(start, [bits of elements start:stop of each vector])

    prunings: one a vector, in the order of pruning; they share method, seed and conflict_aware. name: what random masks
    are drawn under. Masks do not depend on `block` (elements; default: the engine's).
    """

    def __init__(self, prunings: list[Pruning], name: str, dtypes: list[str], numel: int, engine, block=None):
        self._prunings, self._first, self._dtypes, self._engine = prunings, prunings[0], dtypes, engine
        block = block or engine.BLOCK
        ms = {pruning.m for pruning in prunings}
        self.in_passes = len(ms) == 1 and in_passes(self._first, block)
        # Blocks and stretches are whole units. Groups are whole in one, so that nm ranks each without the others.
        self.unit = _DRAWS
        if self._first.method == "nm" and not self.in_passes:
            group = math.lcm(*ms)
            self.unit = group * _GROUPS if group * _GROUPS <= _SMALL else group
        self._step = block if self.in_passes else max(block // self.unit, 1) * self.unit
        self._numel = numel
        self._room = engine.empty_masks(len(prunings), min(self._step, numel))  # for the largest block
        if self._first.method == "random":
            self._limits = random_limits([pruning.density for pruning in prunings], self._first.conflict_aware)
            self._generator_keys = [random_key(pruning, j, name) for j, pruning in enumerate(prunings)]
        self._scopes = self._plan_scopes() if self.in_passes else []

    def _plan_scopes(self) -> list[Scope]:
        cuts = [scopes(pruning, self._numel) for pruning in self._prunings]
        aware = self._first.conflict_aware
        return [
            Scope(start, stop, [cut[i][2] for cut in cuts], self._dtypes, aware, self._engine)
            for i, (start, stop, _) in enumerate(cuts[0])
        ]

    def find_thresholds(self, scan: Callable, peek: Callable) -> None:
        """What of() compares with, where a scope is larger than a block; this reads all vectors, see Scope.find."""
        for scope in self._scopes:
            scope.find(scan, peek, self._step)

    def scanning(self, read: Callable) -> Callable:
        """The scan for find_thresholds() that reads vectors one by one: read(j, start, stop) -> bits of vector j."""

        def scan(which, spans, do):
            for start, stop in spans:
                do(self._engine, start, [read(j, start, stop) for j in which])

        return scan

    @property
    def thresholds(self) -> list[list[Threshold]]:
        """Of each scope, each vector's threshold, once they were found; may be set to what was found before."""
        return [scope.thresholds for scope in self._scopes]

    @thresholds.setter
    def thresholds(self, found: list[list[Threshold]]) -> None:
        for scope, thresholds in zip(self._scopes, found, strict=True):
            scope.thresholds = thresholds
        self.rewind()

    def rewind(self) -> None:
        """Before the blocks are gone through again: a pass uses up the ties at the thresholds."""
        for scope in self._scopes:
            scope.rewind()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks, none of which reaches over the end of a scope."""
        if not self.in_passes:
            return blocks(self._numel, self._step)
        return (span for scope in self._scopes for span in blocks(scope.stop, self._step, scope.start))

    def scope_of(self, start: int) -> int:
        """The number of the scope that a block begins in."""
        return next((i for i, scope in enumerate(self._scopes) if start < scope.stop), 0)

    def by(self, engine) -> "Masks":
        """These masks, made by another engine in blocks of its own length."""
        other = copy(self)
        other._engine, other._room = engine, engine.empty_masks(len(self._prunings), engine.BLOCK)
        return other

    def of(self, start: int, vectors: list) -> list:
        """The masks (uint8, 1 = keep) of the block at `start`, one a vector; valid until the next call."""
        found = [mask[: len(vectors[0])] for mask in self._room]
        if self.in_passes:
            self._scopes[self.scope_of(start)].fill(found, vectors, self._engine)
        elif self._first.method == "random":
            found = self.drawn(start, len(vectors[0]))
            # After the last draw: draws depend on no value, and conflicts are among draws.
            for mask, bits, dtype in zip(found, vectors, self._dtypes, strict=True):
                self._engine.drop_zeros(mask, bits, dtype)
        else:
            for j, mask, taken, levels in in_order(found, self._first.conflict_aware, self._engine):
                n, m = self._prunings[j].n, self._prunings[j].m
                self._engine.nm_mask(mask, vectors[j], self._dtypes[j], taken, levels, n, m)
        return found

    def drawn(self, start: int, size: int) -> list:
        """random: the masks of the `size` elements at `start` as they were drawn, with zeros still in them.

        They need no values, and in a sum a zero is nothing.
        """
        found = [mask[:size] for mask in self._room]
        for j, mask, taken, _ in in_order(found, self._first.conflict_aware, self._engine):
            self._engine.random_mask(mask, start, self._generator_keys[j], taken, self._limits[j])
        return found
