"""Direct I/O: the same bytes as through the page cache, whatever is cached, aligned, refused, cut short or
interrupted.
"""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from checkpoints import files, run, write
from hypothesis import given, settings

from common.pruners import kernels
from common.shards import buffers, direct, stream
from common.shards.blocks import Reader
from common.shards.buffers import InputBuffer, OutputBuffer
from common.shards.direct import PAGE, File, PageCache, aligned

IO = ThreadPoolExecutor(4)  # what reads ahead and writes behind
SIZES = st.lists(st.integers(0, 5 * PAGE), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def small_requests(monkeypatch):
    """Requests of three pages, so that small files need several."""
    monkeypatch.setattr(buffers, "READ", 3 * PAGE)
    monkeypatch.setattr(buffers, "WRITE", 3 * PAGE)


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def staged(path, data: np.ndarray, lead: int, sizes: list[int]) -> None:
    """Write `data` from offset `lead` on, in rooms of these sizes."""
    file, stage, at = File(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), OutputBuffer(IO), 0
    file.prepare(lead + data.size)
    for size in sizes:
        stage.room(file, lead + at, size)[:] = data[at : at + size]
        at += size
    stage.flush()
    file.sync()
    file.close()


def evict(path) -> None:
    """Out of the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 * PAGE), SIZES)
def test_a_stage_writes_what_was_put_in_it(tmp_path_factory, lead, sizes):
    """Any offset, any sizes; nothing before, between or behind; and two stages may share a page of one file."""
    path, data = tmp_path_factory.getbasetemp() / "staged", random_bytes(sum(sizes))
    staged(path, data, lead, sizes)
    assert path.read_bytes() == bytes(lead) + data.tobytes()


def test_stages_share_a_file(tmp_path):
    """Neighbours that meet within a page, written alternately: both whole."""
    data, cut = random_bytes(20 * PAGE), 7 * PAGE + 123
    file, left, right = File(tmp_path / "x", os.O_WRONLY | os.O_CREAT), OutputBuffer(IO), OutputBuffer(IO)
    file.prepare(data.size)
    for i in range(0, cut, 1000):
        left.room(file, i, min(1000, cut - i))[:] = data[i : min(i + 1000, cut)]
        at = cut + 2 * i
        if at < data.size:
            stop = min(at + 2000, data.size)
            right.room(file, at, stop - at)[:] = data[at:stop]
    for at in range(cut + 2 * 1000 * -(-cut // 1000), data.size, 2000):
        right.room(file, at, min(2000, data.size - at))[:] = data[at : at + 2000]
    left.flush()
    right.flush()
    file.close()
    assert (tmp_path / "x").read_bytes() == data.tobytes()


def test_a_stage_holds_no_more_than_a_request(tmp_path):
    """Its memory does not grow with what passes through it."""
    file, stage = File(tmp_path / "x", os.O_WRONLY | os.O_CREAT), OutputBuffer(IO)
    file.prepare(1 << 20)
    for at in range(0, 1 << 20, 1000):
        stage.room(file, at, min(1000, (1 << 20) - at))[:] = 1
        assert stage._memory.nbytes + stage._spare.nbytes <= buffers.HELD_FOR * (buffers.WRITE + 2 * PAGE)
    stage.flush()
    file.close()


def test_whole_pages_go_past_the_cache(tmp_path, monkeypatch):
    """Of a tensor that begins and ends within a page, all but those two pages is written directly, in large pieces."""
    calls, real = [], os.pwrite

    def counted(descriptor, data, offset):
        flags = int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0], 8)
        calls.append((bool(flags & os.O_DIRECT), offset, len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    staged(tmp_path / "x", random_bytes(10 * PAGE), 100, [1000] * 40 + [960])
    assert [call for call in calls if not call[0]] == [(False, 100, PAGE - 100), (False, 10 * PAGE, 100)]
    assert sum(size for is_direct, _, size in calls if is_direct) == 9 * PAGE
    assert len(calls) <= 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5 * PAGE), min_size=2, max_size=8),
    st.sampled_from(["cached", "not", "partly"]),
    st.integers(0, 9999),
)
def test_a_window_reads_what_is_there(tmp_path_factory, sizes, state, begin):
    """Front to back, then again from the front, from a file that is cached, is not, or is in part."""
    path, data = tmp_path_factory.getbasetemp() / "read", random_bytes(begin + sum(sizes))
    path.write_bytes(data.tobytes())
    if state != "cached":
        evict(path)
    if state == "partly":
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), 100, data.size // 2)
    file, window, spans, at = File(path, os.O_RDONLY), InputBuffer(IO), [], begin
    for size in sizes:
        spans.append((at, at + size))
        at += size
    for start, stop in spans + spans:
        found = window.read(file, start, stop, data.size)
        assert np.array_equal(found, data[start:stop])
    assert window.read(file, max(data.size - 5, 0), data.size + 1, data.size + 1) is None
    file.close()


def test_what_is_cached_is_not_read_from_disk(tmp_path, monkeypatch):
    """And what is not is read in requests that serve several blocks."""
    path, data = tmp_path / "x", random_bytes(12 * PAGE)
    path.write_bytes(data.tobytes())
    reads, real = [], File.read
    monkeypatch.setattr(File, "read", lambda self, *a: (reads.append(a[1]), real(self, *a))[1])
    for cached in (True, False):
        if not cached:
            evict(path)
        file, window = File(path, os.O_RDONLY), InputBuffer(IO)
        for start in range(0, data.size, PAGE):
            assert np.array_equal(window.read(file, start, start + PAGE, data.size), data[start : start + PAGE])
        file.close()
        assert reads == ([] if cached else [0, 3 * PAGE, 6 * PAGE, 9 * PAGE])


@pytest.mark.parametrize("lead", [0, 100])
def test_no_block_is_read_twice(tmp_path, monkeypatch, lead):
    """Requests begin where the block begins that is not in memory as a whole, on a page or within one."""
    path, data = tmp_path / "x", random_bytes(lead + 12 * PAGE)
    path.write_bytes(data.tobytes())
    evict(path)
    reads, real = [], File.read
    monkeypatch.setattr(File, "read", lambda self, *a: (reads.append(a[1]), real(self, *a))[1])
    file, window = File(path, os.O_RDONLY), InputBuffer(IO)
    for start in range(lead, data.size, PAGE):
        assert np.array_equal(window.read(file, start, start + PAGE, data.size), data[start : start + PAGE])
    file.close()
    assert reads == [0, 3 * PAGE, 6 * PAGE, 9 * PAGE]


def test_what_is_read_ahead_and_not_asked_for_is_forgotten(tmp_path):
    """A block elsewhere, another file, and back: never the bytes of what was under way."""
    files, window = [], InputBuffer(IO)
    for number in range(2):
        path, data = tmp_path / str(number), random_bytes(40 * PAGE, number)
        path.write_bytes(data.tobytes())
        evict(path)
        files.append((File(path, os.O_RDONLY), data))
    random = np.random.default_rng(0)
    for _ in range(200):
        (file, data), start = files[random.integers(2)], int(random.integers(38 * PAGE))
        for at in range(start, start + int(random.integers(1, 3)) * PAGE, PAGE // 2):
            assert np.array_equal(window.read(file, at, at + PAGE // 2, data.size), data[at : at + PAGE // 2])
    window.wait()
    for file, _ in files:
        file.close()


def test_the_next_request_is_read_and_the_last_one_written_meanwhile(tmp_path, monkeypatch):
    """While a thread works on a block, another reads; while it fills the next request, another writes."""
    path, data = tmp_path / "x", random_bytes(12 * PAGE)
    path.write_bytes(data.tobytes())
    evict(path)
    here, under_way = threading.current_thread(), {"read": threading.Event(), "write": threading.Event()}

    def noticing(event: threading.Event, real):
        def call(self, *arguments):
            if threading.current_thread() is not here:
                event.set()
            return real(self, *arguments)

        return call

    for name, event in under_way.items():
        monkeypatch.setattr(File, name, noticing(event, getattr(File, name)))
    file, window = File(path, os.O_RDONLY), InputBuffer(IO)
    assert not under_way["read"].is_set() and np.array_equal(window.read(file, 0, PAGE, data.size), data[:PAGE])
    assert under_way["read"].wait(10)
    window.wait()
    file.close()
    file, stage = File(tmp_path / "y", os.O_WRONLY | os.O_CREAT), OutputBuffer(IO)
    file.prepare(data.size)
    for at in range(0, 8 * PAGE, PAGE):
        stage.room(file, at, PAGE)[:] = data[at : at + PAGE]
    assert under_way["write"].wait(10)
    stage.flush()
    file.close()
    assert (tmp_path / "y").read_bytes() == data[: 8 * PAGE].tobytes() + bytes(4 * PAGE)


def other_kernel(kind: str, monkeypatch) -> None:
    """What older kernels, sandboxes and macOS say where cachestat is asked for, and mincore."""
    if kind != "cachestat":
        monkeypatch.setattr(direct, "_CACHESTAT", 9999)  # ENOSYS
    if kind == "neither":
        monkeypatch.setattr(direct, "_MINCORE", None)


@pytest.mark.parametrize("kind", ["cachestat", "mincore", "neither"])
def test_what_the_page_cache_holds(tmp_path, monkeypatch, kind):
    """All of a range or not: read, forgotten, read in part, and behind the end; False where nobody can say."""
    path, size = tmp_path / "x", 9 * PAGE + 100
    path.write_bytes(random_bytes(size).tobytes())
    other_kernel(kind, monkeypatch)
    spans = [(0, size), (0, PAGE), (4 * PAGE, 9 * PAGE), (8 * PAGE, size), (0, 1)]

    def held() -> list[bool]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            cache = PageCache(descriptor)
            return [cache.holds(*span) for span in spans] + [cache.holds(9 * PAGE, 10 * PAGE + 1)]
        finally:
            os.close(descriptor)

    os.sync()
    assert held() == [kind != "neither"] * 5 + [False]
    evict(path)
    assert held() == [False] * 6
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 100, 0)
    assert held() == [False, kind != "neither", False, False, kind != "neither", False]
    path.write_bytes(b"")  # emptied since
    assert held() == [False] * 6


class OddKernel:
    """os.open, os.pwrite and os.preadv of a system that lacks what we would like, notices late, or does only part of a
    call."""

    def __init__(self, kind: str, monkeypatch):
        self.kind, self.open, self.pwrite, self.preadv = kind, os.open, os.pwrite, os.preadv
        self.direct = set()
        for name in ("open", "pwrite", "preadv"):
            monkeypatch.setattr(os, name, getattr(self, f"odd_{name}"))

    def odd_open(self, path, flags, *mode):
        if flags & os.O_DIRECT and self.kind == "no direct I/O":
            raise OSError(errno.EINVAL, "no O_DIRECT")
        descriptor = self.open(path, flags, *mode)
        if flags & os.O_DIRECT:
            self.direct.add(descriptor)
        return descriptor

    def check(self, descriptor):
        if self.kind == "larger pages" and descriptor in self.direct:
            raise OSError(errno.EINVAL, "not aligned")

    def odd_pwrite(self, descriptor, data, offset):
        self.check(descriptor)
        return self.pwrite(descriptor, data[:777] if self.kind == "short" and len(data) > 777 else data, offset)

    def odd_preadv(self, descriptor, buffers, offset):
        self.check(descriptor)
        if self.kind == "short" and descriptor not in self.direct:
            buffers = [buffer[:777] for buffer in buffers]
        return self.preadv(descriptor, buffers, offset)


@pytest.mark.parametrize("kind", ["no direct I/O", "larger pages", "short"])
def test_on_odd_systems(tmp_path, monkeypatch, kind):
    """The same bytes, written and read."""
    data = random_bytes(9 * PAGE + 1234)
    OddKernel(kind, monkeypatch)
    staged(tmp_path / "x", data, 333, [5000] * 7 + [data.size - 35000])
    assert (tmp_path / "x").read_bytes() == bytes(333) + data.tobytes()
    evict(tmp_path / "x")
    file, window = File(tmp_path / "x", os.O_RDONLY), InputBuffer(IO)
    for start in range(0, data.size, 5000):
        stop = min(start + 5000, data.size)
        assert np.array_equal(window.read(file, 333 + start, 333 + stop, 333 + data.size), data[start:stop])
    file.close()


def test_disk_errors_are_not_taken_for_missing_direct_io(tmp_path, monkeypatch):
    """Only EINVAL means that; a full disk or a broken one is said."""

    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwrite", broken)
    for rooms in (1, 2, 5):  # written at the end; behind, and noticed then; behind, and noticed before
        with pytest.raises(OSError, match="broken"):
            staged(tmp_path / "x", random_bytes(rooms * 3 * PAGE), 0, [3 * PAGE] * rooms)


def test_aligned_memory():
    assert all(aligned(n).ctypes.data % PAGE == 0 and aligned(n).size == n for n in (1, PAGE, 3 << 20))


def test_what_is_read_again_comes_from_memory(tmp_path, monkeypatch):
    """magnitude goes through its vectors twice: the second time from the page cache or, as far as that goes, the
    shelf."""
    write(tmp_path / "base", {"w": torch.linspace(-1, 1, 9000).half(), "x": torch.linspace(1, 3, 500).half()})
    write(tmp_path / "a", {"w": torch.linspace(1, -1, 9000).half(), "x": torch.linspace(1, 4, 500).half()})
    run(
        "extract",
        "--finetuned_model_path",
        tmp_path / "a",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    )
    monkeypatch.setattr(kernels, "BLOCK", 1000)
    monkeypatch.setattr(stream, "worker_count", lambda: 1)
    reads, real = [], Reader._bits
    monkeypatch.setattr(
        Reader, "_bits", lambda self, *a: (reads.append(self.tensor.path.parent.name), real(self, *a))[1]
    )
    weights = []
    for number, (cached, shelves, expected) in enumerate(
        ((False, 0, 20), (False, 3 * 2000, 16), (False, 1 << 20, 10), (True, 1 << 20, 20))
    ):
        out = tmp_path / f"p{number}"
        monkeypatch.setattr(File, "is_cached", lambda self, begin, end, cached=cached: cached)
        reads.clear()
        monkeypatch.setattr(stream, "SHELVES", shelves)
        run(
            "prune",
            "--pruning_method",
            "magnitude",
            "--task_vector_paths",
            tmp_path / "v",
            "--save_directories",
            out,
        )
        assert reads.count("v") == expected
        weights.append(files(out)["model.safetensors"])
    assert all(weight == weights[0] for weight in weights)
