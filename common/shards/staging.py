"""Directories and files that appear whole or not at all.

Work happens under another name on the same file system, is made durable, and is renamed at the end.
"""

import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError
from common.shards.places import refuse_existing


def part_of(final: Path) -> Path:
    """The name a directory has until it is whole: part_of(Path("a/b")) -> a/b.part."""
    return final.with_name(final.name + ".part")


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(directory: Path) -> int:
    """An open descriptor that holds `directory` for this process; the kernel lets go when the process ends.

    Raises DataError if another process holds it.
    """
    path = directory / ".run" / "lock"  # a file, because a directory cannot be locked on NFS
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(descriptor).st_ino:  # not one that was renamed away meanwhile
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    raise DataError(f"{directory}: another run is writing there; wait for it, or write elsewhere")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != ".run":
            _remove(path)


def settle(part: Path) -> None:
    """Give files the mode the user's umask gives (safetensors writes 0600) and make all of them durable."""
    os.umask(mask := os.umask(0o022))
    for path in part.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)
    sync(part)


def move(part: Path, final: Path) -> None:
    """Rename a directory; what was under the new name goes once the new one is in its place."""
    old = part.with_name(part.name + ".old")  # a name that only we use
    if os.path.lexists(final):
        _remove(old)
        os.rename(final, old)
    os.rename(part, final)
    sync(final.absolute().parent)
    _remove(old)


@contextmanager
def staged_directory(final: Path, overwrite: bool):
    """An empty directory `<final>.part` to fill; renamed to `final` on success, deleted on any failure."""
    refuse_existing(final, overwrite)
    final = final.absolute()
    part = part_of(final)
    descriptor = lock(part)
    try:
        _empty(part)
        yield part
        settle(part)
        move(part, final)
        shutil.rmtree(final / ".run")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file or none: the old one, if any, stays until the new one is durable."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
