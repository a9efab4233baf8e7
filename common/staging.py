"""Directories and files that appear whole or not at all.

Work happens under another name on the same file system, is made durable, and is renamed at the end.
"""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(part: Path) -> int:
    """An open descriptor that holds `part` for this process; the kernel lets go when the process ends."""
    part.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"{part}: another run is writing there; wait for it, or write elsewhere") from None
    return descriptor


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _settle(part: Path) -> None:
    """Give files the mode the user's umask gives (safetensors writes 0600) and make all of them durable."""
    os.umask(mask := os.umask(0o022))
    for path in part.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        _sync(path)
    _sync(part)


def _replace(part: Path, final: Path) -> None:
    """Rename `part` to `final`; what was there goes once the new one is in its place."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(part, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """DataError if something is there already, unless it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise DataError(f"{path}: already there; give --overwrite to replace it, or write elsewhere")


@contextmanager
def staged_directory(final: Path, overwrite: bool):
    """An empty directory `<final>.part` to fill; renamed to `final` on success, deleted on any failure."""
    refuse_existing(final, overwrite)
    final = final.absolute()
    part = final.with_name(final.name + ".part")
    descriptor = _lock(part)
    try:
        _empty(part)
        yield part
        _settle(part)
        _replace(part, final)
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
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value, default=str) -> None:
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, default=default) + "\n").encode())
