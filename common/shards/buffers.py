"""What one thread holds of its files, in memory that it reuses from tensor to tensor.

Inputs are held ahead of where they are read, outputs until they make a request for the disk.
"""

import numpy as np

from common.shards.direct import PAGE, File, aligned, page_down, page_up

# Bytes of a request to the disk. Larger ones are faster (the disk measured read 0.5 MB at two thirds of its rate, and
# wrote 4 MB at four fifths), and take more memory: one of each per thread and file.
READ, WRITE = 4 << 20, 16 << 20


class InputBuffer:
    """The part of an input that is in memory: a block from the page cache, or a request's worth from the disk."""

    def __init__(self):
        self._memory = np.empty(0, np.uint8)
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
        base = page_down(begin)
        last = min(page_up(limit), base + max(READ, page_up(end) - base))
        if self._memory.size < last - base:
            self._memory = aligned(last - base)
        goes_on = file is self._file and begin == self._end and end <= self._cached_end
        if goes_on or file.is_cached(base, min(last, limit)):
            self._cached_end = self._cached_end if goes_on else last
            self._end = begin + file.read_cached(self._memory[begin - base : end - base], begin)
        else:
            self._cached_end = 0
            self._end = base + file.read(self._memory[: last - base], base)
        self._file, self._begin = file, begin


class Shelf:
    """What came from the disk and will be read again within a task, kept in memory up to a budget."""

    def __init__(self, nbytes: int):
        self._nbytes, self._memory, self._filled = nbytes, None, 0
        self._found: dict[tuple, np.ndarray] = {}

    def get(self, key: tuple) -> np.ndarray | None:
        """What was kept under `key`."""
        return self._found.get(key)

    def keep(self, key: tuple, data: np.ndarray) -> None:
        """Keep a copy, if there is room for it."""
        if self._filled + data.size <= self._nbytes:
            if self._memory is None:
                self._memory = aligned(self._nbytes)
            self._found[key] = self._memory[self._filled : self._filled + data.size]
            self._found[key][:] = data
            self._filled += data.size

    def clear(self) -> None:
        """Forget everything."""
        self._found, self._filled = {}, 0


class OutputBuffer:
    """Bytes on their way to one file, gathered in order until they make a request for the disk."""

    def __init__(self):
        self._memory = np.empty(0, np.uint8)
        # `held` bytes that belong at `begin` and after it are in memory from begin % PAGE on.
        self._file, self._begin, self._held = None, 0, 0

    def room(self, file: File, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] to be filled with what belongs at `offset`: right after the last room, anywhere after flush().

        Valid until the next call.
        """
        if self._held == 0:
            self._file, self._begin = file, offset
        if self._begin % PAGE + self._held + nbytes > self._memory.size:
            self._make_room(nbytes)
        at = self._begin % PAGE + self._held
        self._held += nbytes
        return self._memory[at : at + nbytes]

    def _make_room(self, nbytes: int) -> None:
        """Write the whole pages; keep the rest, less than a page, in memory that is large enough."""
        end = self._begin + self._held
        rest = max(page_down(end), self._begin)
        self._write(self._begin, rest)
        left = self._view(rest, end).copy()
        if self._memory.size < 2 * PAGE + nbytes:
            self._memory = aligned(page_up(max(WRITE, nbytes)) + 2 * PAGE)
        self._begin, self._held = rest, end - rest
        self._view(rest, end)[:] = left

    def _view(self, begin: int, end: int) -> np.ndarray:
        at = self._begin % PAGE + begin - self._begin
        return self._memory[at : at + end - begin]

    def _write(self, begin: int, end: int) -> None:
        """Write a range, the whole pages of it in one piece."""
        first, last = min(page_up(begin), end), max(page_down(end), begin)
        pieces = [(begin, first), (first, last), (last, end)] if first < last else [(begin, end)]
        for start, stop in pieces:
            if start < stop:
                self._file.write(self._view(start, stop), start)

    def flush(self) -> None:
        """Write everything that is held."""
        self._write(self._begin, self._begin + self._held)
        self._held = 0
