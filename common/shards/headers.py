"""Safetensors headers and indexes: read, check, describe.

Everything a plan needs is in the headers: names, dtypes, shapes, and where the bytes are. Headers may
come from anyone, so every number in them is checked before it is used, in memory
bounded by MAX_HEADER_BYTES. Format: https://huggingface.co/docs/safetensors (8 bytes little-endian
header length, JSON padded with spaces, then the tensors' bytes, contiguous).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.shards.documents import MAX_HEADER_BYTES, parse_json, read_json, refuse_lfs_pointer

DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
FLOAT_DTYPES = ("F16", "BF16", "F32")
DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}


MAX_DIMENSIONS = 16
MAX_NAME = 1000  # characters of a tensor's name
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Tensor:
    """Where the bytes of one tensor are: `nbytes` from `offset` in `path`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    is_constant: bool = False  # says the architecture (architecture.py), not the header

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.nbytes // DTYPE_BYTES[self.dtype]

    @property
    def is_parameter(self) -> bool:
        """False for what pruning and converting leave alone: integer buffers, rotary inv_freq, constants."""
        is_float = self.dtype[0] in "FB" and self.dtype != "BOOL"
        return is_float and not self.is_constant and not self.name.endswith("inv_freq")


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _shape_bytes(shape: list, dtype: str, limit: int) -> int | None:
    """Bytes of a tensor, or None once they exceed `limit` (so that hostile shapes stay cheap)."""
    if 0 in shape:
        return 0
    total = DTYPE_BYTES[dtype]
    for dim in shape:
        total *= dim
        if total > limit:
            return None
    return total


def _check_entry(path: Path, name: str, entry, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry, every number of it checked."""
    if len(name) > MAX_NAME:
        raise DataError(
            f"{path}: a tensor's name of {len(name)} characters, at most {MAX_NAME} are accepted; get the checkpoint "
            "from a source you trust"
        )
    where = f"tensor {name!r} in {path}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise DataError(f"{where}: the header needs dtype, shape and data_offsets; download the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise DataError(
            f"{where}: its dtype {dtype!r:.40} is none of those read here ({', '.join(DTYPE_BYTES)}); take a version "
            "of the model in float16, bfloat16 or float32"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise DataError(f"{where}: {shape!r:.60} is not a shape; download the file again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise DataError(f"{where}: {offsets!r:.60} are not data_offsets; download the file again")
    begin, end = offsets  # of any size: Python's integers do not wrap, so the comparisons hold for malicious ones too
    if begin > end or end > data_bytes:
        raise DataError(
            f"{where}: data_offsets {offsets} lie outside the file's {data_bytes} bytes of data; "
            "it is truncated or damaged, download it again"
        )
    needed = _shape_bytes(shape, dtype, data_bytes)
    if needed != end - begin:
        raise DataError(f"{where}: {dtype} {shape} does not fill its {end - begin} bytes; download the file again")
    return dtype, tuple(shape), begin, end


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """(header JSON, size of the file) of a safetensors file."""
    refuse_lfs_pointer(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        # First, because eight letters taken as a length are more than any file has, and "too few bytes" would mislead.
        if prefix.lower().startswith((b"<!doctyp", b"<html")):
            raise DataError(
                f"{path}: a web page, not the file, as a download without access leaves it; download it again"
            )
        if len(prefix) < 8 or length > size - 8:
            raise DataError(
                f"{path}: {size} bytes, too few for its header; it is truncated or not a safetensors file, "
                "download it again"
            )
        if length > MAX_HEADER_BYTES:  # before it is read: JSON takes many times its size in memory
            raise DataError(
                f"{path}: a header of {length} bytes, at most {MAX_HEADER_BYTES} are accepted; get it from a source "
                "you trust"
            )
        return file.read(length), size


def read_file_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises DataError unless offsets are contiguous, without overlap, and end where the file ends.
    """
    text, size = _header_bytes(path)
    header = parse_json(text, str(path))
    if not isinstance(header, dict):
        raise DataError(f"{path}: the header is not a JSON object; download the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: __metadata__ in the header is not a JSON object; download the file again")
    start = 8 + len(text)
    entries = [(name, *_check_entry(path, name, entry, size - start)) for name, entry in header.items()]
    entries.sort(key=lambda entry: (entry[3], entry[4]))  # by the end, too: an empty tensor begins where the next does
    position = 0
    for name, _, _, begin, end in entries:
        if begin != position:
            found = "overlaps the one before it" if begin < position else "leaves a hole before it"
            raise DataError(
                f"tensor {name!r} in {path}: begins at byte {begin} and {found} "
                f"(expected {position}); download the file again"
            )
        position = end
    if start + position != size:
        raise DataError(
            f"{path}: {size} bytes, but its header describes {start + position}; "
            "it is truncated or damaged, download it again"
        )
    return [Tensor(n, d, s, path, start + b, e - b) for n, d, s, b, e in entries]


def _is_plain_name(file, suffix: str) -> bool:
    """Whether a name from an index is that of a file in the same directory, and fit to be printed."""
    if not isinstance(file, str) or not file.endswith(suffix) or file.startswith("."):
        return False
    return file.isprintable() and len(file.encode()) <= 255 and not set(file) & set("/\\")


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """{tensor name: file name} of an index; file names must be plain names that end in `suffix`."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{path}: needs a 'weight_map' of tensor names to files; download it again")
    for name, file in weight_map.items():
        if not _is_plain_name(file, suffix):
            raise DataError(
                f"{path}: tensor {name!r:.200} is mapped to {file!r:.80}, which is not a plain file name "
                f"ending in {suffix}; get the checkpoint from a source you trust"
            )
    return weight_map


def check_index(index: Path, weight_map: dict[str, str], tensors: list[Tensor]) -> None:
    """Refuse shards that do not hold exactly what their index says."""
    found = {}
    for tensor in tensors:
        if tensor.name in found:
            raise DataError(
                f"tensor {tensor.name!r:.200} is in both {found[tensor.name]} and {tensor.path.name} "
                f"of {index.parent}; download the checkpoint again"
            )
        found[tensor.name] = tensor.path.name
    for name, file in weight_map.items():
        if found.get(name) != file:
            raise DataError(
                f"tensor {name!r:.200} is not in {index.parent / file}, where {index.name} says it is; "
                "download the checkpoint again"
            )
    # mergekit reads what the index names, transformers what is in the files: they would not see the same model.
    for name, file in found.items():
        if name not in weight_map:
            raise DataError(
                f"tensor {name!r:.200} of {index.parent / file} is not in {index.name}; download the checkpoint again"
            )


def shard_paths(index: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files an index names, in name order, each of which must exist."""
    paths = [index.parent / file for file in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            there = sum(other.is_file() for other in paths)
            raise DataError(
                f"{path}: missing, though {index.name} names it ({there} of {len(paths)} files are there); download "
                "the rest"
            )
    return paths


def read_headers(directory: Path) -> list[Tensor] | None:
    """The tensors of a safetensors checkpoint, in file order; None if the directory holds none.

    A single file beside an index that maps every tensor to it (mlx_lm writes both) is accepted.
    """
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if not index.is_file():
        return read_file_header(single) if single.is_file() else None
    weight_map = read_index(index, ".safetensors")
    if single.is_file() and set(weight_map.values()) != {SINGLE_NAME}:
        raise DataError(
            f"{directory}: holds both {SINGLE_NAME} and {INDEX_NAME}, and tools disagree on which counts; "
            "delete the one that is stale"
        )
    tensors = [t for path in shard_paths(index, weight_map) for t in read_file_header(path)]
    check_index(index, weight_map, tensors)
    return tensors
