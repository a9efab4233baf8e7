"""Tensors block by block: a reader for each input, a writer for each output slot."""

from collections.abc import Callable, Iterator

import numpy as np

from common.errors import DataError
from common.shards.buffers import InputBuffer, OutputBuffer, Shelf
from common.shards.direct import File
from common.shards.headers import DTYPE_BYTES, Tensor
from common.shards.layout import Slot

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def blocks(numel: int, block: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks: blocks(5, 2) -> (0, 2), (2, 4), (4, 5)."""
    return ((at, min(at + block, numel)) for at in range(start, numel, block))


class Reader:
    """The elements of one tensor as bits, flat: uint8, uint16, uint32 or uint64, as wide as its dtype.

    advance(nbytes) is told what has passed. With a shelf, what came from the disk is kept there for another pass.
    """

    def __init__(self, tensor: Tensor, file: File, buffer: InputBuffer, advance: Callable, shelf: Shelf | None):
        self.tensor, self.dtype, self.numel = tensor, tensor.dtype, tensor.numel
        self._file, self._buffer, self._advance, self._shelf = file, buffer, advance, shelf
        self._size, self._seen = DTYPE_BYTES[tensor.dtype], 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bits of elements start:stop, valid until the next read."""
        # What is read in several passes counts once, or the progress bar would end at a multiple of the whole: how
        # many passes there are depends on the data.
        self._advance(max(0, stop - max(start, self._seen)) * self._size)
        self._seen = max(self._seen, stop)
        if self._shelf is None:
            return self._bits(start, stop, self.numel)
        kept = self._shelf.get((self.tensor, start, stop))
        if kept is not None:
            return kept.view(_BITS[self._size])
        bits = self._bits(start, stop, self.numel)
        if self._buffer.is_from_disk:
            self._shelf.keep((self.tensor, start, stop), bits.view(np.uint8))
        return bits

    def peek(self, start: int, stop: int) -> np.ndarray:
        """The same for a small part out of order: nothing is read ahead, and it does not count as progress."""
        self._advance(0)
        return self._bits(start, stop, stop)

    def _bits(self, start: int, stop: int, last: int) -> np.ndarray:
        """Elements start:stop, of those up to `last` that will be asked for."""
        begin, end, limit = (self.tensor.offset + number * self._size for number in (start, stop, last))
        data = self._buffer.read(self._file, begin, end, limit)
        if data is None:
            raise DataError(
                f"tensor {self.tensor.name!r} in {self.tensor.path}: the file ends within it; "
                "it was cut short while it was read: copy or download it again, then run the same command"
            )
        if begin % self._size:  # other writers than ours need not align a tensor to its elements
            data = data.copy()
        return data.view(_BITS[self._size])


class Writer:
    """The elements of one slot of an output file, filled in order and without gaps."""

    def __init__(self, slot: Slot, file: File, buffer: OutputBuffer, advance: Callable):
        self._slot, self._file, self._buffer, self._advance = slot, file, buffer, advance
        self._size = DTYPE_BYTES[slot.dtype]

    def room(self, start: int, stop: int) -> np.ndarray:
        """Where to put elements start:stop, as bits; valid until the next call, on disk after flush() at the latest."""
        self._advance((stop - start) * self._size)
        offset = self._slot.offset + start * self._size
        return self._buffer.room(self._file, offset, (stop - start) * self._size).view(_BITS[self._size])

    def flush(self) -> None:
        """Write what is still in memory."""
        self._buffer.flush()
