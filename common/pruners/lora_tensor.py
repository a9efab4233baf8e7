"""One tensor of a task vector from a LoRA adapter: read A and B, multiply by rows, round."""

import numpy as np

from common.errors import DataError
from common.pruners import kernels
from common.pruners.kernels.lora import delta_rows
from common.shards.adapters import MERGE, Product
from common.shards.blocks import blocks
from common.shards.dtypes import wider_than
from common.shards.headers import DTYPE_NAMES, Tensor
from common.shards.stream import Task, Worker, new_hash, not_finite


def _floats(worker: Worker, tensor: Tensor) -> np.ndarray:
    """A whole tensor as float32 [first axis, the rest], exactly."""
    out, reader = np.empty(tensor.numel, np.uint32), worker.reader(tensor)
    for start, stop in blocks(tensor.numel, kernels.BLOCK):
        if not kernels.convert(reader.read(start, stop), tensor.dtype, out[start:stop], "F32"):
            raise not_finite(tensor)
    return out.view(np.float32).reshape(tensor.shape[0], -1)


def _check_copy(copy: Tensor, theirs: np.ndarray, base: Tensor, own: np.ndarray, dtype: str) -> None:
    """Refuse a block of an adapter's copy of a base tensor that differs from the base's, both rounded to `dtype`."""
    scratch = np.empty(own.size, kernels.BITS_DTYPE[dtype])
    differs = np.zeros(1, np.int64)
    kernels.subtract(theirs, copy.dtype, own, base.dtype, scratch, dtype, differs)
    if differs[0]:
        raise DataError(
            f"tensor {copy.name!r} in {copy.path}: an adapted tensor's own copy of {base.name!r}, and not the same as "
            f"in {base.path}; {MERGE}"
        )


def lora_tensor(task: Task, worker: Worker, product: Product, dtype: str) -> list[dict]:
    """Write round(scale · B·A) of a base's tensor (task.inputs[-1]); the record as extraction has it.

    A and B of the one tensor are in memory as float32, and a block of rows of their product.
    """
    base = task.inputs[-1]
    a, b = _floats(worker, product.a), _floats(worker, product.b)
    source, (writer,) = worker.reader(base), worker.writers(task)
    copy = worker.reader(product.copy) if product.copy else None
    if product.transposed:  # (B·A)ᵀ = Aᵀ·Bᵀ: the same products, added in the same order
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    width, base_hash, vector_hash, differs = a.shape[1], new_hash(), new_hash(), 0
    for start, stop in blocks(b.shape[0], max(1, kernels.BLOCK // max(1, width))):
        bits = delta_rows(a, b, product.scale, start, stop).reshape(-1).view(np.uint32)
        out = writer.room(start * width, stop * width)
        if not kernels.convert(bits, "F32", out, dtype):
            raise DataError(
                f"tensor {base.name!r}: a value of scale · B·A of {product.b.path} is beyond the largest "
                f"{DTYPE_NAMES[dtype]}; {f'extract with --dtype {wider}' if (wider := wider_than(dtype)) else MERGE}"
            )
        own = source.read(start * width, stop * width)
        if not kernels.all_finite(own, base.dtype):
            raise not_finite(base)
        if copy:
            _check_copy(copy.tensor, copy.read(start * width, stop * width), base, own, dtype)
        base_hash.update(own)
        vector_hash.update(out)
        differs += int(np.count_nonzero(out << out.dtype.type(1)))  # all bits but the sign
    return [{"base": base_hash.hexdigest(), "written": vector_hash.hexdigest(), "differs": differs}]
