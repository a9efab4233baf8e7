"""JSON files: read with suspicion, written completely or not at all.

They may come from anyone, so their size, their depth and their names are bounded.
"""

import json
import re
from collections import Counter
from pathlib import Path

from common.errors import DataError
from common.shards.staging import write_file

MAX_HEADER_BYTES = 25_000_000  # the largest public checkpoints have shards with headers of a few MB


MAX_RECORD_BYTES = 500_000_000  # prune_report.json has 400 bytes for each tensor and more for each further vector


MAX_DEPTH = 50  # of objects and lists in a config.json; Python's own limit would be hit while writing it


_LFS = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in place of a large one until `git lfs pull`: a few lines of text."""
    with open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS


def refuse_lfs_pointer(path: Path) -> None:
    """DataError for a Git LFS pointer, which says nothing of the file that belongs there."""
    if is_lfs_pointer(path):
        raise DataError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull` in {path.parent}")


def parse_json(data: bytes, where: str, strict: bool = True):
    """The value of one JSON text. Text that is not Unicode is refused; so is, if `strict`, a name twice in an object.

    Not strict is what transformers does with a config.json: a byte order mark is skipped, the last of two names counts.
    """

    def unique(pairs):
        found = dict(pairs)
        if strict and len(found) != len(pairs):
            double = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{where}: the name {double!r:.80} occurs twice; download or write the file again")
        return found

    try:
        text = data.decode("utf-8" if strict else "utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique)
        if re.search(r"\\u[dD]", text):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: not valid JSON ({reason:.100}); download or write the file again") from None


def _is_deeper(value, depth: int) -> bool:
    """Whether objects and lists are nested more than `depth` deep: _is_deeper({"a": [1]}, 1) -> True."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)


def read_json(path: Path, strict: bool = True, most_bytes: int = MAX_HEADER_BYTES) -> dict:
    """The object in a JSON file of at most `most_bytes`, nested at most MAX_DEPTH deep; see parse_json."""
    refuse_lfs_pointer(path)
    if path.stat().st_size > most_bytes:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, more than the {most_bytes} a JSON file here may have; get the "
            "checkpoint from a source you trust"
        )
    value = parse_json(path.read_bytes(), str(path), strict)
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: a JSON object is needed, found {type(value).__name__}; download or write the file again"
        )
    if _is_deeper(value, MAX_DEPTH):
        raise DataError(f"{path}: nested more than {MAX_DEPTH} deep; get the checkpoint from a source you trust")
    return value


def read_record(path: Path) -> dict:
    """The object in a file of ours that has an entry for each tensor: of a model of many experts it may be large."""
    return read_json(path, most_bytes=MAX_RECORD_BYTES)


def write_json(path: Path, value, default=str) -> None:
    """Write a value as indented JSON, completely or not at all."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, default=default) + "\n").encode())
