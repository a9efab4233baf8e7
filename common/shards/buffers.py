"""What one thread holds of its files, in memory that it reuses from tensor to tensor.

Inputs are held ahead of where they are read, outputs until they make a request for the disk. While a thread works on
one request's worth, other threads (`io`) read the next one and write the last one: so as many threads compute as there
are cores, and none of them waits for a disk that keeps up.
"""

from concurrent.futures import Executor, Future, wait
from typing import NamedTuple

import numpy as np

from common.shards.direct import PAGE, File, aligned, page_down, page_up

# Bytes of a request to the disk. Larger ones are faster (the disk measured read 0.5 MB at two thirds of its rate, and
# wrote 4 MB at four fifths), and take more memory: HELD_FOR of each per thread and file.
READ, WRITE = 4 << 20, 8 << 20
HELD_FOR = 2  # requests: one that is worked on, one that is under way


def _span(begin: int, end: int, limit: int) -> tuple[int, int]:
    """The pages to request for begin:end and what follows, of which bytes up to `limit` will be asked for."""
    # READ bytes from `begin` on, not from its page: blocks fit into it whole, and none is read twice.
    return page_down(begin), min(page_up(limit), page_up(begin + max(READ, end - begin)))


def _read(file: File, memory: np.ndarray, base: int, last: int, limit: int) -> int | None:
    """Read base:last past the page cache -> how many bytes; None, and nothing is read, if the cache has them."""
    if file.is_cached(base, min(last, limit)):
        return None
    return file.read(memory[: last - base], base)


def _at_least(memory: np.ndarray, nbytes: int) -> np.ndarray:
    return memory if memory.size >= nbytes else aligned(nbytes)


class _Ahead(NamedTuple):
    """A request that is under way into a buffer's spare memory."""

    request: tuple[File, int, int]  # pages base:last of a file
    reading: Future  # of _read()


class InputBuffer:
    """The part of an input that is in memory: a block from the page cache, or a request's worth from the disk."""

    def __init__(self, io: Executor):
        self._io, self._ahead = io, None
        self._memory, self._spare = np.empty(0, np.uint8), np.empty(0, np.uint8)
        self._file, self._begin, self._end = None, 0, 0  # bytes begin:end are in memory from begin % PAGE on
        self._cached_end = 0  # up to here, from where we are, the page cache has the file

    @property
    def is_from_disk(self) -> bool:
        """Whether what was read last came from the disk, not from the page cache."""
        return self._cached_end == 0

    def read(self, file: File, begin: int, end: int, limit: int) -> np.ndarray | None:
        """Bytes begin:end of a file (of those up to `limit` that will be asked for), None if the file ends before.

        Valid until the next call.
        """
        if file is not self._file or not self._begin <= begin or not end <= self._end:
            self._fill(file, begin, end, limit)
        if end > self._end:
            return None
        at = self._begin % PAGE + begin - self._begin
        return self._memory[at : at + end - begin]

    def _fill(self, file: File, begin: int, end: int, limit: int) -> None:
        base, last = _span(begin, end, limit)
        goes_on = file is self._file and begin == self._end and end <= self._cached_end
        from_disk = None if goes_on else self._requested(file, base, last, limit)
        self._file, self._begin = file, begin
        if from_disk is None:
            self._cached_end = self._cached_end if goes_on else last
            self._memory = _at_least(self._memory, last - base)
            self._end = begin + file.read_cached(self._memory[begin - base : end - base], begin)
        else:
            self._cached_end, self._end = 0, base + from_disk
            self._read_ahead(end - begin, limit)

    def _requested(self, file: File, base: int, last: int, limit: int) -> int | None:
        """_read() into this buffer's memory, or its result if that was read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead.request == (file, base, last):
            self._memory, self._spare = self._spare, self._memory
            return ahead.reading.result()
        if ahead:
            wait([ahead.reading])  # until then the spare memory is not free; whether it failed is nobody's concern
        self._memory = _at_least(self._memory, last - base)
        return _read(file, self._memory, base, last, limit)

    def _read_ahead(self, block: int, limit: int) -> None:
        """Begin to read on from the first block to come that is not in memory as a whole."""
        begin = self._begin + max((self._end - self._begin) // block, 1) * block
        if begin < limit:
            base, last = _span(begin, min(begin + block, limit), limit)
            self._spare = _at_least(self._spare, last - base)
            reading = self._io.submit(_read, self._file, self._spare, base, last, limit)
            self._ahead = _Ahead((self._file, base, last), reading)

    def wait(self) -> None:
        """Return when nothing is under way."""
        if self._ahead:
            wait([self._ahead.reading])


class Shelf:
    """What a task keeps from one pass to the next, up to a budget: what came from the disk and will be read again."""

    def __init__(self, nbytes: int):
        self._nbytes, self._memory, self._filled = nbytes, None, 0
        self._found: dict[tuple, np.ndarray] = {}

    def get(self, key: tuple) -> np.ndarray | None:
        """What was kept under `key`."""
        return self._found.get(key)

    def room(self, nbytes: int) -> np.ndarray | None:
        """uint8 [nbytes] until clear(), None where the budget does not reach."""
        begin = -(-self._filled // 8) * 8  # where numbers of every width may begin
        if begin + nbytes > self._nbytes:
            return None
        if self._memory is None:
            self._memory = aligned(self._nbytes)
        self._filled = begin + nbytes
        return self._memory[begin : self._filled]

    def keep(self, key: tuple, data: np.ndarray) -> None:
        """Keep a copy, if there is room for it."""
        room = self.room(data.size)
        if room is not None:
            room[:] = data
            self._found[key] = room

    def clear(self) -> None:
        """Forget everything."""
        self._found, self._filled = {}, 0


class OutputBuffer:
    """Bytes on their way to one file, gathered in order until they make a request for the disk."""

    def __init__(self, io: Executor):
        self._io, self._writing = io, Future()  # of what is in the spare memory
        self._writing.set_result(None)
        self._memory, self._spare = np.empty(0, np.uint8), np.empty(0, np.uint8)
        # `held` bytes that belong at `begin` and after it are in memory from begin % PAGE on.
        self._file, self._begin, self._held = None, 0, 0

    def room(self, file: File, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] to be filled with what belongs at `offset`: right after the last room, anywhere after flush().

        Valid until the next call. Raises OSError for what could not be written of earlier rooms.
        """
        if self._held == 0:
            self._file, self._begin = file, offset
        if self._begin % PAGE + self._held + nbytes > self._memory.size:
            self._make_room(nbytes)
        at = self._begin % PAGE + self._held
        self._held += nbytes
        return self._memory[at : at + nbytes]

    def _make_room(self, nbytes: int) -> None:
        """Have the whole pages written; what is left, less than a page, begins the other memory."""
        end = self._begin + self._held
        rest = max(page_down(end), self._begin)
        left = self._view(rest, end)
        self._writing.result()
        if rest > self._begin:
            self._writing = self._io.submit(_write, self._file, self._view(self._begin, rest), self._begin)
        self._memory, self._spare = self._spare, self._memory
        if self._memory.size < 2 * PAGE + nbytes:
            self._memory = aligned(page_up(max(WRITE, nbytes)) + 2 * PAGE)
        self._begin, self._held = rest, end - rest
        self._view(rest, end)[:] = left

    def _view(self, begin: int, end: int) -> np.ndarray:
        at = self._begin % PAGE + begin - self._begin
        return self._memory[at : at + end - begin]

    def flush(self) -> None:
        """Return when everything that is held is written, or raise OSError."""
        _write(self._file, self._view(self._begin, self._begin + self._held), self._begin)
        self._writing.result()
        self._held = 0

    def wait(self) -> None:
        """Return when nothing is under way."""
        wait([self._writing])


def _write(file: File, data: np.ndarray, begin: int) -> None:
    """Write what belongs at `begin`, the whole pages of it in one piece."""
    end = begin + data.size
    first, last = min(page_up(begin), end), max(page_down(end), begin)
    pieces = [(begin, first), (first, last), (last, end)] if first < last else [(begin, end)]
    for start, stop in pieces:
        if start < stop:
            file.write(data[start - begin : stop - begin], start)
