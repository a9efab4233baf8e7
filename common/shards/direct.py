"""Between memory and disk without filling the page cache.

Filling it costs a core more than pruning does: pages are found, cleared, filled and later written by other threads, and
what others use is pushed out. So what the cache holds is read from there; everything else is read directly, in large
pieces at multiples of PAGE, and so everything is written: 2.3 GB to a new file take 0.14 s of system time where writes
through the cache take 2.3, even if they leave it at once (RWF_DONTCACHE), and are there as soon (measured). Where a
file system or a system has no direct I/O, as macOS, the same bytes pass through the cache.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.shards.systems import make_durable

PAGE = 4096  # offsets, sizes and addresses of direct I/O are multiples of it: enough for every common disk
_LIBC = ctypes.CDLL(None, use_errno=True)
_MINCORE = getattr(_LIBC, "mincore", None)
_CACHESTAT = 451  # the number of the system call, one for all processors (Linux 6.5); elsewhere another call has it
_HAS_CACHESTAT = sys.platform == "linux" and hasattr(_LIBC, "syscall")


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


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


class _Stat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


class PageCache:
    """What the page cache holds of one open file.

    cachestat counts pages; older kernels, and those that refuse it, are asked with mincore, which writes a byte for
    each page of a mapped file: 0.13 to 0.2 ms for 4 MB where cachestat takes 0.02 (measured).
    """

    def __init__(self, descriptor: int):
        self._descriptor, self._map, self._counts = descriptor, None, _HAS_CACHESTAT

    def holds(self, begin: int, end: int) -> bool:
        """Whether it holds all of begin:end, `begin` a multiple of the page size; False where nobody can say.

        Of another user's file that we may not write the kernel says that it does; it is then read through the cache.
        """
        pages = (end - 1) // mmap.PAGESIZE - begin // mmap.PAGESIZE + 1
        if self._counts:
            found = _Stat()
            span = _Range(begin, end - begin)
            if not _LIBC.syscall(_CACHESTAT, self._descriptor, ctypes.byref(span), ctypes.byref(found), 0):
                return found.cached == pages
            self._counts = False
        return self._all_resident(begin, end, pages)

    def _all_resident(self, begin: int, end: int, pages: int) -> bool:
        if _MINCORE is None:
            return False
        try:
            if self._map is None:  # of addresses only: what is mapped here is never touched
                self._map = np.frombuffer(mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ), np.uint8)
        except (OSError, ValueError):  # a file system without maps; a file that was emptied since
            return False
        if end > self._map.size:
            return False
        resident = np.zeros(pages, np.uint8)
        failed = _MINCORE(
            ctypes.c_void_p(self._map.ctypes.data + begin),
            ctypes.c_size_t(end - begin),
            ctypes.c_void_p(resident.ctypes.data),
        )
        return not failed and bool((resident & 1).all())


class File:
    """A file open twice: through the page cache, and past it. Threads may share it."""

    def __init__(self, path: Path, flags: int):
        self._path, self._cached, self._direct = path, os.open(path, flags, 0o666), None
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # this file system has no direct I/O
                self._direct = os.open(path, flags & ~os.O_CREAT & ~os.O_TRUNC | os.O_DIRECT)
        self._is_direct = self._direct is not None
        self._page_cache = PageCache(self._cached)

    def close(self) -> None:
        """Close both descriptors."""
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
            written = self._call(os.pwrite, data, offset)
            data, offset = data[written:], offset + written

    def is_cached(self, begin: int, end: int) -> bool:
        """Whether the page cache holds all of begin:end, `begin` a multiple of PAGE."""
        return self._page_cache.holds(begin, end)

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
