"""Directories and files that appear complete or not at all.

Work happens under another name on the same file system, is made durable, and is renamed at the end.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError
from common.shards.places import (
    INSIDE,
    LOST_AND_FOUND,
    MOVING,
    REFUSED,
    RUN,
    cannot_be_renamed,
    refuse_existing,
    refuse_what_appeared,
)
from common.shards.systems import make_durable, try_lock


def _meant(final: Path) -> Path:
    """Of a link to a directory, that directory: it may be on another disk, which is what the link is for."""
    return final.resolve() if final.is_symlink() and final.is_dir() else final


def part_of(final: Path) -> Path:
    """The name a directory has until it is complete: part_of(Path("a/b")) -> a/b.part.

    A mount point cannot be renamed over, and its bytes belong on its own disk: there the work is done in a/b/.part.
    """
    final = _meant(final)
    return final / INSIDE if cannot_be_renamed(final) else final.with_name(final.name + ".part")


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        make_durable(descriptor, path)
    finally:
        os.close(descriptor)


def lock(directory: Path) -> int:
    """An open descriptor that holds `directory` for this process; the kernel releases it when the process ends.

    Raises DataError if another process holds it.
    """
    path = directory / RUN / "lock"  # a file, because a directory cannot be locked on NFS
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not one that was renamed away meanwhile.
        if try_lock(descriptor, path) and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except FileNotFoundError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise DataError(f"{directory}: another job is writing there; wait for it, or write elsewhere")


def remove(path: Path) -> None:
    """Delete a file, a directory, or a link and not what it leads to; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != RUN:
            remove(path)


def make_ready(part: Path) -> None:
    """Give files the mode the user's umask gives (safetensors writes 0600) and make all of them durable."""
    os.umask(mask := os.umask(0o022))
    for path in part.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)
    sync(part)


def move(part: Path, final: Path) -> None:
    """Make `part` what is under the new name; what was there is deleted once the new one is in its place (at a mount
    point: just before)."""
    if part.name == INSIDE:
        _move_out(part)
        return
    final = _meant(final)
    old = part.with_name(part.name + ".old")  # a name that only we use
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        remove(old)
        os.rename(final, old)
    os.rename(part, final)  # over an empty directory, too
    sync(final.absolute().parent)
    remove(old)


def _move_out(part: Path) -> None:
    """Move the files of a/b/.part to a/b, which has to stay the directory that it is.

    config.json is deleted first and moved last: without it a directory is not a checkpoint, so nobody mistakes half of
    one for all of it. The job's record gets its own name once .part is deleted: if this is killed anywhere, the same
    command makes again what has left .part and gets to the end, or finds that the job is done.
    """
    final, run = part.parent, part / RUN
    (run / MOVING).touch()
    (final / "config.json").unlink(missing_ok=True)
    for path in final.iterdir():
        if path.name not in (INSIDE, LOST_AND_FOUND):
            remove(path)
    files = [path for path in part.iterdir() if path != run]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        os.rename(path, final / path.name)
    sync(final)  # before the record: after a power cut there must be none of files that are not there
    os.rename(run, final / MOVING)
    part.rmdir()
    os.rename(final / MOVING, final / RUN)
    sync(final)


def _is_anothers(part: Path) -> bool:
    """Whether `part` holds something that staged_directory(), killed, has not left there: a lock beside files."""
    if not part.is_dir() or not any(part.iterdir()):
        return False
    if (part / RUN / REFUSED).is_file():  # nothing of it counts
        return False
    return (part / RUN / "run.json").is_file() or not (part / RUN / "lock").is_file()


@contextmanager
def staged_directory(final: Path, overwrite: bool):
    """An empty directory `<final>.part` to fill; renamed to `final` on success, deleted on any failure.

    Raises DataError if that holds what another job has written, unless it may be replaced.
    """
    refuse_existing(final, overwrite)
    final = final.absolute()
    part = part_of(final)
    left = _is_anothers(part)  # before lock() makes a file in it
    descriptor = lock(part)
    if left and not overwrite:
        os.close(descriptor)
        raise DataError(
            f"{part}: left by another job; finish that job with its own command, delete the directory, or give "
            "--overwrite to start afresh"
        )
    try:
        _empty(part)
        yield part
        refuse_what_appeared(final, overwrite)
        make_ready(part)
        move(part, final)
        shutil.rmtree(final / RUN)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: the old one, if any, stays until the new one is durable."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            make_durable(file.fileno(), part)
        os.rename(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
