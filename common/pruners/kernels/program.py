"""Steps of several kernels, noted once and taken on block after block, each time in one call.

Called one by one, each kernel leaves a whole block behind, which is in the caches no more when the next one comes, and
between two calls threads take turns. A program takes all steps on one stretch of the block before it moves on: what one
step leaves in scratch memory is still in the second-level cache for the next. (A kernel goes through its stretch in
chunks, for the first level.)
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np

from common.pruners import kernels
from common.pruners.kernels.compiler import Step, address, list_steps, take

STRETCH = 1 << 14  # elements: with scratch of two vectors and their masks 200 kB, less than a second-level cache


class Program:
    """What is done to each block of some arrays.

        def note(engine, start, arrays):           # arrays: stand-ins for a stretch of each, which begins at `start`
            vector = engine.scratch("F16")         # room for a stretch that belongs to the program
            engine.subtract(arrays[1], "F16", arrays[0], "F16", vector, "F16")
            engine.add(vector_sum.steps, …)        # any other function that is @in_steps

        program = Program(note)
        finite = program.run(start, [base, model])  # blocks, as often as there are any

    `engine` has the functions of a kernels.engine that are @in_steps, and subtract(); they take note, and nothing is
    computed until run(). A stretch is a multiple of `unit`, as groups of m must be whole in it.
    """

    def __init__(self, note: Callable, unit: int = 1):
        self._note, self._stretch = note, max(STRETCH // unit, 1) * unit
        self._noted: dict[int, _Noted] = {}  # by the length of a stretch: of whole ones and of the last
        self._scope = None

    def run(self, start: int, arrays: list[np.ndarray], scope=None) -> bool:
        """Take all steps on a block at `start` of the tensor, `arrays` of one length -> whether all values are finite.

        Stops at the first step that met one that is not. In another `scope` than before the steps are noted anew.
        """
        if scope != self._scope:
            self._noted, self._scope = {}, scope
        size = arrays[0].size
        whole = size // self._stretch * self._stretch
        parts = (0, whole, self._stretch), (whole, size, size - whole)
        return all(self._run(start, arrays, begin, end, stretch) for begin, end, stretch in parts if begin < end)

    def _run(self, start: int, arrays: list[np.ndarray], begin: int, end: int, stretch: int) -> bool:
        if stretch not in self._noted:
            self._noted[stretch] = _Noted(self._note, stretch, start + begin, arrays)
        return self._noted[stretch].take(start + begin, [array[begin:end] for array in arrays])


class _Noted:
    """The steps of a program for stretches of one length."""

    def __init__(self, note: Callable, stretch: int, start: int, arrays: list[np.ndarray]):
        self._stretch = stretch
        self._steps: list[Step] = []  # held, because the listing has but addresses
        stand_ins = [np.empty(stretch, array.dtype) for array in arrays]
        note(self._engine(), start, stand_ins)
        self._listing = np.array(list_steps(self._steps, stretch), np.int64)
        self._origins = np.array([*map(address, stand_ins), start], np.int64)
        # Where in the listing something stands that each block has another of, and of what: its number in _origins.
        places = list(self._places(stand_ins))
        self._at, self._which = (np.array(each, np.int64) for each in zip(*places, strict=True))
        self._moves = np.zeros_like(self._listing)
        self._moves[self._at] = stretch * np.array([*(array.itemsize for array in arrays), 1])[self._which]

    def _places(self, stand_ins: list[np.ndarray]) -> Iterator[tuple[int, int]]:
        at = 0
        for _, elements, others in self._steps:
            at += 2 + len(others)
            for each in elements:
                if isinstance(each, int):
                    yield at, len(stand_ins)
                for i, stand_in in enumerate(stand_ins):
                    if each is stand_in:
                        yield at, i
                    elif not isinstance(each, int) and np.may_share_memory(each, stand_in):
                        raise ValueError("a step was given part of a stand-in; give it the whole array")
                at += 1

    def _engine(self) -> SimpleNamespace:
        """The engine that takes note."""
        functions = {name: getattr(kernels, name) for name in kernels.ENGINE}
        in_steps = {name: each for name, each in functions.items() if hasattr(each, "steps")}
        noting = {name: partial(self._add, each.steps) for name, each in in_steps.items()}
        return SimpleNamespace(
            BLOCK=self._stretch,
            MAGNITUDE_BITS=kernels.MAGNITUDE_BITS,
            empty_masks=kernels.empty_masks,
            scratch=lambda dtype: np.empty(self._stretch, kernels.BITS_DTYPE[dtype]),
            subtract=partial(self._add, kernels.subtract.steps),
            add=self._add,
            **noting,
        )

    def _add(self, steps: Callable, *given) -> None:
        self._steps += steps(*given)

    def take(self, start: int, arrays: list[np.ndarray]) -> bool:
        """Take the steps on a block of these arrays, at `start`."""
        listing = self._listing.copy()
        moved = np.array([*map(address, arrays), start], np.int64) - self._origins
        listing[self._at] += moved[self._which]
        return bool(take(listing, self._moves, arrays[0].size, self._stretch))
