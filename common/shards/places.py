"""Where outputs go: is the place free, is there room for them?"""

import errno
import os
import re
import shutil
from pathlib import Path

from common.errors import DataError

INSIDE = ".part"  # where an output is made that has to be made within the directory it goes to; see staging.part_of
RUN = ".run"  # in a directory that is being made: whose it is, what of it is complete
MOVING = ".run.moving"  # there while files are moved out of it; see staging.move
REFUSED = "refused"  # in .run: this job met bad data, so nothing of it counts; see publish.mark_refused
LOST_AND_FOUND = "lost+found"  # a disk's own


def plain(path: Path) -> Path:
    """The shortest spelling of the same place: plain(Path("./a/../x/")) -> x, plain(Path("/a//b/.")) -> /a/b.

    `..` behind a symbolic link leads to the parent of what the link points at, so there the link is resolved; behind a
    directory that is not there yet it leads back, as os.path.normpath has it, while the kernel would call it an error.
    """
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if part != "..":
            found = found / part
        elif found.is_symlink():
            found = found.resolve().parent
        elif found.name not in ("", ".."):
            found = found.parent
        elif not found.anchor or found.name:  # above the working directory; nothing is above /
            found = found / ".."
    return found


def whole_path(path: Path | str) -> str:
    """The one spelling that a place has everywhere: absolute, no links in it. Jobs are told apart by it.

    whole_path("./x") == whole_path("y/../x") == whole_path(Path.cwd() / "x")
    """
    return str(plain(Path(path)).resolve())


def check_places(inputs: list[Path], outputs: list[Path]) -> None:
    """Refuse outputs that overlap with an input or one another, or that are or contain the working directory.

    An output's names include those it has while it is made: see staging.py. Of an input's files, those that are links
    count where they lead.
    """
    places = [path.resolve() for path in outputs]
    taken = [path.resolve() for path in inputs]
    taken += [file for path in inputs for file in _linked_files(path)]
    for i, place in enumerate(places):
        if place in (Path.cwd(), *Path.cwd().parents):
            raise DataError(
                f"{outputs[i]}: is the working directory or holds it; give the output a directory of its own"
            )
        names = [place, *(place.with_name(place.name + ending) for ending in (".part", ".part.old"))]
        for other in taken:
            if any(name == other or other in name.parents or name in other.parents for name in names):
                raise DataError(f"{outputs[i]}: output and {other} overlap; give the output a directory of its own")
        taken += names


def _linked_files(directory: Path) -> list[Path]:
    """The files elsewhere that links in a directory, or in one right below it, lead to."""
    place = directory.resolve()
    names = (file for pattern in ("*", "*/*") for file in place.glob(pattern))
    links = (file for file in names if file.is_symlink() or file.parent.is_symlink())
    found = {file.resolve() for file in links if os.path.isfile(file)}
    return sorted(file for file in found if place not in file.parents)


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path`, or itself, that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_disk(needs: dict[Path, int]) -> None:
    """Refuse unless every file system has room for the bytes that are still to be written to it."""
    by_device: dict[int, list] = {}
    for output, nbytes in needs.items():
        parent = existing_parent(output)
        entry = by_device.setdefault(os.stat(parent).st_dev, [parent, 0])
        entry[1] += nbytes
    for parent, nbytes in by_device.values():
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise DataError(
                f"{parent}: {nbytes / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free; "
                "free some space or write elsewhere"
            )


def is_empty(path: Path) -> bool:
    """Whether a directory holds nothing of the user's: only what a disk or an unfinished job of ours puts there."""
    return path.is_dir() and all(entry.name in (INSIDE, LOST_AND_FOUND) for entry in path.iterdir())


def is_half_published(path: Path) -> bool:
    """Whether a job was stopped while it moved its files out of path/.part; see staging.move."""
    return (path / INSIDE / RUN / MOVING).is_file() or (path / MOVING).is_dir()


def refuse_existing(path: Path, overwrite: bool) -> None:
    """DataError if something is there already, unless it may be replaced. An empty directory is nothing."""
    if os.path.lexists(path) and not overwrite and not is_empty(path) and not is_half_published(path):
        raise DataError(f"{path}: already there; give --overwrite to replace it, or write elsewhere")


def refuse_what_appeared(path: Path, overwrite: bool) -> None:
    """The same when a job is done, hours after it was asked first. FileExistsError, as the job's work is to stay."""
    try:
        refuse_existing(path, overwrite)
    except DataError:
        raise FileExistsError(
            errno.EEXIST, "appeared while this job ran, and would be deleted; move it away", str(path)
        ) from None


def refuse_existing_outputs(paths: list[Path], overwrite: bool) -> None:
    """The same of all outputs of a job, before its inputs are opened, which may mean to download them.

    A job that was stopped while it renamed its outputs leaves its record in the first: whether that is this very job
    is known once its inputs are.
    """
    if not (paths[0] / RUN / "run.json").is_file():
        for path in paths:
            refuse_existing(path, overwrite)


def refuse_existing_file(path: Path, overwrite: bool) -> None:
    """The same of a file to be written: a directory in its place is refused, even with overwrite."""
    if path.is_dir():
        raise DataError(f"{path}: a directory; give a file's name")
    refuse_existing(path, overwrite)


def refuse_unwritable_file(path: Path) -> None:
    """DataError if a file, written when all else is done, has no place: what is there already may be replaced."""
    refuse_existing_file(path, overwrite=True)
    parent = existing_parent(path.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"{path}: nothing can be written to {parent}; give another place")


def cannot_be_renamed(path: Path) -> bool:
    """Whether a directory stays where it is: a mount point, or one in a directory that we may not write to.

    os.path.ismount does not see what is bound from the same disk (docker -v): the kernel's own list does.
    """
    if not path.is_dir():
        return False
    place = os.path.realpath(path)
    in_place = os.path.ismount(place) or place in _mount_points()
    return in_place or not os.access(os.path.dirname(place), os.W_OK | os.X_OK)


def _mount_points() -> set[str]:
    """What Linux's mountinfo lists: the fifth field, its blanks and backslashes as octal numbers."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # another system
        return set()
    points = (line.split(b" ", 5)[4] for line in lines)
    return {os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), point)) for point in points}
