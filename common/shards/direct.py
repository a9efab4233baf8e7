"""Between memory and disk without filling the page cache.

Filling it costs a core more than pruning does: pages are found, cleared, filled and later written by other threads, and
what others use is pushed out. So what the cache holds is read from there; everything else is read directly, in large
pieces at multiples of PAGE. What is written leaves the cache as soon as it is on disk (RWF_DONTCACHE, Linux 6.14: the
same few pages again and again, many requests at a time); on older systems it is written directly, too. Where a file
system has neither, or a system lacks these calls, as macOS does, the same bytes pass through the cache.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.shards.systems import make_durable

PAGE = 4096  # offsets, sizes and addresses of direct I/O are multiples of it: enough for every common disk
_DONTCACHE = 0x80  # Linux's RWF_DONTCACHE, which Python has no name for yet
_TAKES_FLAGS = hasattr(os, "pwritev") and hasattr(os, "RWF_DSYNC")  # elsewhere pwritev refuses any flag
_MINCORE = getattr(ctypes.CDLL(None), "mincore", None)


def aligned(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] that begins at a multiple of PAGE, in huge pages where the kernel has them."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def page_down(offset: int) -> int:
    """The last multiple of PAGE that is not above: page_down(5000) -> 4096."""
    return offset // PAGE * PAGE


def page_up(offset: int) -> int:
    """The first multiple of PAGE that is not below: page_up(5000) -> 8192."""
    return -(-offset // PAGE) * PAGE


class File:
    """A file open twice: through the page cache, and past it. Threads may share it."""

    def __init__(self, path: Path, flags: int):
        self._path, self._cached, self._direct = path, os.open(path, flags, 0o666), None
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # this file system has no direct I/O
                self._direct = os.open(path, flags & ~os.O_CREAT & ~os.O_TRUNC | os.O_DIRECT)
        self._is_direct, self._drops = self._direct is not None, _TAKES_FLAGS
        self._map = None

    def close(self) -> None:
        """Close both descriptors."""
        self._map = None
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def prepare(self, nbytes: int) -> None:
        """Make an output this long."""
        os.ftruncate(self._cached, nbytes)

    def sync(self) -> None:
        """Make durable what was written either way."""
        make_durable(self._cached, self._path)

    def _call(self, call, data: np.ndarray, offset: int) -> int:
        """call(descriptor, data, offset), past the cache where alignment allows it and the file system does."""
        if self._is_direct and not (offset % PAGE or data.size % PAGE or data.ctypes.data % PAGE):
            try:
                return call(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._is_direct = False  # the file system wants larger pages, or has no direct I/O after all
        return call(self._cached, data, offset)

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write all of `data`, uint8, at `offset`."""
        while data.size:
            written = self._write(data, offset)
            data, offset = data[written:], offset + written

    def _write(self, data: np.ndarray, offset: int) -> int:
        if self._drops:
            try:
                return os.pwritev(self._cached, [data], offset, _DONTCACHE)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._drops = False  # an older kernel, or a file system that cannot
        return self._call(os.pwrite, data, offset)

    def is_cached(self, begin: int, end: int) -> bool:
        """Whether the page cache holds all of begin:end, `begin` a multiple of PAGE.

        Of another user's file that we may not write the kernel says that it does; it is then read through the cache.
        """
        if _MINCORE is None:
            return False
        try:
            if self._map is None:  # of addresses only: what is mapped here is never touched
                self._map = np.frombuffer(mmap.mmap(self._cached, 0, prot=mmap.PROT_READ), np.uint8)
        except (OSError, ValueError):  # a file system without maps; a file that was emptied since
            return False
        if end > self._map.size:
            return False
        pages = np.zeros(page_up(end - begin) // PAGE, np.uint8)
        failed = _MINCORE(
            ctypes.c_void_p(self._map.ctypes.data + begin),
            ctypes.c_size_t(end - begin),
            ctypes.c_void_p(pages.ctypes.data),
        )
        return not failed and bool((pages & 1).all())

    def read_cached(self, data: np.ndarray, offset: int) -> int:
        """Fill `data` from `offset` through the page cache -> how many bytes; fewer only at the end of the file."""
        return _fill(data, lambda rest, done: _pread(self._cached, rest, offset + done))

    def read(self, data: np.ndarray, offset: int) -> int:
        """Fill `data` from `offset`, past the page cache -> how many bytes; fewer only at the end of the file."""
        return _fill(data, lambda rest, done: self._call(_pread, rest, offset + done))


def _pread(descriptor: int, data: np.ndarray, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [data], offset)
    found = os.pread(descriptor, data.size, offset)  # macOS before 11
    data[: len(found)] = np.frombuffer(found, np.uint8)
    return len(found)


def _fill(data: np.ndarray, read: Callable[[np.ndarray, int], int]) -> int:
    """read(rest of data, bytes done) until nothing is left or nothing comes -> bytes done."""
    done = 0
    while done < data.size and (got := read(data[done:], done)):
        done += got
    return done
