"""PyTorch .bin checkpoints described like safetensors, without executing a pickle.

A .bin is a zip of uncompressed storages and one pickle. torch reads the pickle with weights_only=True
(no code can run) under FakeTensorMode (no weight is read), which leaves on each storage its offset in
the file; from there on a .bin is read like any other file.
"""

import logging
import re
import struct
import zipfile
from pathlib import Path

from common.errors import DataError
from common.shards.documents import MAX_HEADER_BYTES, refuse_lfs_pointer
from common.shards.headers import MAX_DIMENSIONS, MAX_NAME, Tensor, check_index, read_index, shard_paths

INDEX_NAME = "pytorch_model.bin.index.json"
SINGLE_NAME = "pytorch_model.bin"
_DTYPES = {  # torch's names
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_TAKE_ANOTHER = "use a safetensors version of this model"


def _check_record(path: Path, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Refuse what would be read as other bytes than torch reads (or would crash torch: byte order)."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise DataError(f"{path}: its zip is compressed; {_TAKE_ANOTHER}")
    if record.filename.endswith("/byteorder") and archive.open(record).read(8) != b"little":
        raise DataError(f"{path}: not in little-endian byte order; {_TAKE_ANOTHER}")
    if record.filename.endswith("/data.pkl") and record.file_size > MAX_HEADER_BYTES:
        raise DataError(f"{path}: a pickle of {record.file_size} bytes; {_TAKE_ANOTHER}")


def _records(path: Path) -> dict[int, int]:
    """{offset of its first byte: bytes} of every record of the zip."""
    refuse_lfs_pointer(path)
    found = {}
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise DataError(
                f"{path}: damaged, or in PyTorch's old format from before 1.6; download it again, or {_TAKE_ANOTHER}"
            )
        try:
            archive = zipfile.ZipFile(file)
            for record in archive.infolist():
                _check_record(path, archive, record)
                file.seek(record.header_offset + 26)  # where the local header has the lengths of name and extra
                start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                found[start] = record.file_size
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            struct.error,
        ) as error:
            raise DataError(
                f"{path}: not a valid zip file ({error!s:.80}); it is cut short or damaged, download it again"
            ) from None
    return found


def _state_dict(path: Path) -> dict:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    logging.disable(logging.CRITICAL)  # torch logs a traceback of what it then raises
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many types here, and all mean the same to the user
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to run {wanted[1]}, and nothing in a checkpoint is run" if wanted else str(error)
        raise DataError(
            f"{path}: not readable as plain tensors ({reason.partition(chr(10))[0]:.160}); {_TAKE_ANOTHER}"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    inner = [key for key, value in state.items() if isinstance(value, dict)] if isinstance(state, dict) else []
    if inner and not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(
            f"{path}: a training checkpoint, whose tensors are one level deeper, under {inner[0]!r:.60}; save what is "
            f"there alone, or {_TAKE_ANOTHER}"
        )
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, needed is a state dict of tensors; {_TAKE_ANOTHER}")
    return state


def _describe(path: Path, name: str, value, records: dict[int, int]) -> Tensor:
    """The file range of one fake tensor of a .bin, which must be within the record of its storage."""
    import torch

    codes = {getattr(torch, name): code for name, code in _DTYPES.items()}
    # As headers.py does, and safetensors' own word: what is written from a .bin has to be read again.
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME or name == "__metadata__":
        raise DataError(f"{path}: {ascii(name):.80} is not a tensor's name; {_TAKE_ANOTHER}")
    if not isinstance(value, torch.Tensor) or value.dtype not in codes or value.layout != torch.strided:
        found = f"{value.dtype}, {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"tensor {name!r} in {path}: found {found}, needed is a plain tensor; {_TAKE_ANOTHER}")
    if value.dim() > MAX_DIMENSIONS:
        raise DataError(
            f"tensor {name!r} in {path}: {value.dim()} dimensions, at most {MAX_DIMENSIONS} are accepted; "
            f"{_TAKE_ANOTHER}"
        )
    # A view of other bytes than its own in order, or of bytes whose sign torch flips on reading: neither can be
    # streamed.
    if not value.is_contiguous() or value.is_neg():
        raise DataError(
            f"tensor {name!r} in {path}: a view with strides {tuple(value.stride())}, needed is row-major; "
            "load the model and save it as safetensors"
        )
    # Offsets come from the pickle, which may say anything: the bytes must be one record of the zip, or part of it.
    storage = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    nbytes, skipped = value.numel() * value.element_size(), value.storage_offset() * value.element_size()
    if storage not in records or skipped + nbytes > records[storage]:
        raise DataError(f"tensor {name!r} in {path}: the file does not hold its {nbytes} bytes; download it again")
    return Tensor(name, codes[value.dtype], tuple(value.shape), path, storage + skipped, nbytes)


def read_file(path: Path) -> list[Tensor]:
    """The tensors of one .bin file, in state-dict order."""
    records = _records(path)
    return [_describe(path, name, value, records) for name, value in _state_dict(path).items()]


def read_headers(directory: Path) -> list[Tensor] | None:
    """The tensors of a .bin checkpoint, in state-dict order; None if the directory holds none."""
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():
        return read_file(single)
    if not index.is_file():
        return None
    weight_map = read_index(index, ".bin")
    tensors = [t for path in shard_paths(index, weight_map) for t in read_file(path)]
    check_index(index, weight_map, tensors)
    return tensors
