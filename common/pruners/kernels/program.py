"""Steps of several kernels, noted once and taken on block after block, each time in one call.

Kernels that are called one by one leave each a whole block behind, which the next one finds in the caches no more, and
between two calls threads take turns. A program goes chunk by chunk instead: what one step leaves in scratch memory is
still in the second-level cache for the next one.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np

from common.pruners import kernels
from common.pruners.kernels.arithmetic import subtract_steps
from common.pruners.kernels.compiler import Step, address, list_steps, take

CHUNK = 1 << 14  # elements: with scratch of two vectors and their masks 200 kB, less than a second-level cache


class Program:
    """What is done to each block of some arrays.

        def note(engine, start, arrays):           # arrays: stand-ins for a chunk of each, which begins at `start`
            vector = engine.scratch("F16")
            engine.subtract(arrays[1], "F16", arrays[0], "F16", vector, "F16")
            engine.drop_zeros(mask, vector, "F16")

        program = Program(note)
        finite = program.run(start, [base, model])  # blocks, as often as there are any

    `engine` has the functions of a kernels.engine that work on a block; they take note, and nothing is computed until
    run(). A chunk is a multiple of `unit`, as groups of m must be whole in it.
    """

    def __init__(self, note: Callable, unit: int = 1):
        self._note, self._chunk = note, max(CHUNK // unit, 1) * unit
        self._noted: dict[int, _Noted] = {}  # by the length of a chunk: of whole ones and of the last
        self._scope = None

    def run(self, start: int, arrays: list[np.ndarray], scope=None) -> bool:
        """Take all steps on a block at `start` of the tensor, `arrays` of one length -> whether all values are finite.

        Stops at the first step that met one that is not. In another `scope` than before the steps are noted anew.
        """
        if scope != self._scope:
            self._noted, self._scope = {}, scope
        size = arrays[0].size
        whole = size // self._chunk * self._chunk
        parts = (0, whole, self._chunk), (whole, size, size - whole)
        return all(self._run(start, arrays, begin, end, chunk) for begin, end, chunk in parts if begin < end)

    def _run(self, start: int, arrays: list[np.ndarray], begin: int, end: int, chunk: int) -> bool:
        if chunk not in self._noted:
            self._noted[chunk] = _Noted(self._note, chunk, start + begin, arrays)
        return self._noted[chunk].take(start + begin, [array[begin:end] for array in arrays])


class _Noted:
    """The steps of a program for chunks of one length."""

    def __init__(self, note: Callable, chunk: int, start: int, arrays: list[np.ndarray]):
        self._chunk = chunk
        self._steps: list[Step] = []  # they hold what the listing has addresses of
        stand_ins = [np.empty(self._chunk, array.dtype) for array in arrays]
        note(self._engine(), start, stand_ins)
        self._listing = np.array(list_steps(self._steps, self._chunk), np.int64)
        self._moves, which, places, at = np.zeros_like(self._listing), [], [], 0
        for _, elements, others in self._steps:
            at += 2 + len(others)
            for each in elements:
                number = next((i for i, stand_in in enumerate(stand_ins) if each is stand_in), None)
                if isinstance(each, int) or number is not None:
                    places.append(at)
                    which.append(-1 if number is None else number)
                    self._moves[at] = self._chunk * (1 if number is None else each.itemsize)
                at += 1
        self._places, self._which = np.array(places, np.int64), np.array(which, np.int64)
        self._origins = np.array([*map(address, stand_ins), start], np.int64)

    def _engine(self) -> SimpleNamespace:
        functions = (subtract_steps, *(getattr(kernels, name).steps for name in _NOTED))
        noting = {name: partial(self._add, function) for name, function in zip(("subtract", *_NOTED), functions)}
        return SimpleNamespace(
            BLOCK=self._chunk,
            MAGNITUDE_BITS=kernels.MAGNITUDE_BITS,
            empty_masks=kernels.empty_masks,
            scratch=lambda dtype: np.empty(self._chunk, kernels.BITS_DTYPE[dtype]),
            add=self._add,
            **noting,
        )

    def _add(self, steps: Callable, *given) -> None:
        self._steps += steps(*given)

    def take(self, start: int, arrays: list[np.ndarray]) -> bool:
        listing, size = self._listing.copy(), arrays[0].size
        moved = np.array([*map(address, arrays), start], np.int64) - self._origins
        listing[self._places] += moved[self._which]
        return bool(take(listing, self._moves, size, self._chunk))


_NOTED = ("all_finite", "count_keys", "count_taken", "drop_zeros", "nm_mask", "random_mask", "tally", "threshold_mask")
