"""Where outputs go: is the place free, is there room for them?"""

import os
import shutil
from pathlib import Path

from common.errors import DataError


def one_spelling(path: Path) -> str:
    """What a path is called, however it was typed: 'x', './x', 'a/../x' and the absolute path give one text.

    A link in the last place is not followed: an output that replaces it is another file than what it points to.
    """
    return str(path.parent.resolve() / path.name)


def check_places(inputs: list[Path], outputs: list[Path]) -> None:
    """Refuse outputs that are, hold, or lie inside an input or one another, or that are or hold the working directory."""
    places = [path.resolve() for path in outputs]
    for i, place in enumerate(places):
        if place in (Path.cwd(), *Path.cwd().parents):
            raise DataError(
                f"{outputs[i]}: is the working directory or holds it; give the output a directory of its own"
            )
        for other in [path.resolve() for path in inputs] + places[:i]:
            if place == other or other in place.parents or place in other.parents:
                raise DataError(f"{outputs[i]}: output and {other} overlap; give the output a directory of its own")


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path`, or itself, that is there."""
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


def refuse_existing(path: Path, overwrite: bool) -> None:
    """DataError if something is there already, unless it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise DataError(f"{path}: already there; give --overwrite to replace it, or write elsewhere")
