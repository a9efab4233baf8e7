"""PyTorch .bin checkpoints described like safetensors, without executing a pickle.

A .bin is a zip of uncompressed storages and one pickle. torch reads the pickle with weights_only=True
(no code can run) under FakeTensorMode (no weight is read), which leaves on each storage its offset in
the file; from there on a .bin is read like any other file.
"""

from pathlib import Path

from common.errors import DataError
from common.headers import Tensor, check_index, read_index, shard_paths

INDEX_NAME = "pytorch_model.bin.index.json"
SINGLE_NAME = "pytorch_model.bin"


def _state_dict(path: Path) -> dict:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many types here, and all mean the same to the user
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{path}: not readable as plain tensors ({reason:.160}); use a safetensors version of this model"
        ) from None
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, needed is a state dict of tensors")
    return state


def _describe(path: Path, name: str, value, size: int) -> Tensor:
    """The file range of one fake tensor of a .bin."""
    import torch

    codes = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    if not isinstance(value, torch.Tensor) or value.dtype not in codes:
        found = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(
            f"tensor {name!r} in {path}: found {found}, needed is a plain tensor; "
            "use a safetensors version of this model"
        )
    storage = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if storage is None:
        raise DataError(
            f"{path}: written in PyTorch's old format, before 1.6; load it and save it again with "
            "safe_serialization=True"
        )
    if not value.is_contiguous():
        raise DataError(
            f"tensor {name!r} in {path}: stored with strides {tuple(value.stride())}, needed is row-major; "
            "load the model and save it as safetensors"
        )
    nbytes = value.numel() * value.element_size()
    offset = storage + value.storage_offset() * value.element_size()
    if offset + nbytes > size:
        raise DataError(f"tensor {name!r} in {path}: ends beyond the file's {size} bytes; download it again")
    return Tensor(name, codes[value.dtype], tuple(value.shape), path, offset, nbytes)


def _read_file(path: Path) -> list[Tensor]:
    size = path.stat().st_size
    return [_describe(path, name, value, size) for name, value in _state_dict(path).items()]


def read_headers(directory: Path) -> list[Tensor] | None:
    """The tensors of a .bin checkpoint, in state-dict order; None if the directory holds none."""
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():
        return _read_file(single)
    if not index.is_file():
        return None
    weight_map = read_index(index, ".bin")
    tensors = [t for path in shard_paths(index, weight_map) for t in _read_file(path)]
    check_index(index, weight_map, tensors)
    return tensors
