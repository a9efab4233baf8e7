"""Parameters in floating point, or refused: quantised weights, dtypes without exact arithmetic here."""

from common.errors import DataError
from common.shards.checkpoint import Checkpoint
from common.shards.headers import FLOAT_DTYPES, Tensor


def _is_packed(tensor: Tensor) -> bool:
    """Whether integers are weights: bitsandbytes' and mlx's `weight`, GPTQ's `qweight`, `weight_packed`, gpt-oss's
    `_blocks`."""
    last = tensor.name.rpartition(".")[2]
    return tensor.dtype[0] in "IU" and ("weight" in last or last.endswith("_blocks"))


def check_floats(checkpoint: Checkpoint) -> None:
    """Refuse parameters in a dtype without exact arithmetic here (float64, 8 bits)."""
    for tensor in checkpoint.tensors.values():
        if tensor.is_parameter and tensor.dtype not in FLOAT_DTYPES:
            raise DataError(
                f"tensor {tensor.name!r} is {tensor.dtype} in {checkpoint.label}; needed is float16, "
                "bfloat16 or float32: take an unquantised version of the model"
            )
    packed = [tensor for tensor in checkpoint.tensors.values() if _is_packed(tensor)]
    if packed:  # whatever config.json says: as a buffer it would pass unchanged, and nobody would notice
        largest = max(packed, key=lambda tensor: tensor.nbytes)
        raise DataError(
            f"tensor {largest.name!r} is {largest.dtype} in {checkpoint.label}: its weights are quantised; "
            "take an unquantised version of the model"
        )
    if checkpoint.config.get("quantization_config"):  # null and {} say that there is none
        raise DataError(
            f"{checkpoint.label}: config.json has a quantization_config, but no weight is quantised; if it is left "
            "over, remove it from config.json, or else take an unquantised version of the model"
        )


def wider_than(dtype: str) -> str | None:
    """Which dtypes hold larger values, in words: wider_than("F16") -> "bfloat16 or float32"; None where none does."""
    return {"F16": "bfloat16 or float32", "BF16": "float32"}.get(dtype)


def check_kinds(base: Checkpoint, other: Checkpoint, own: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Refuse a tensor that is a parameter (floating point) in one model and a buffer in the other.

    own, others: their tensors under names that agree, however each model spells them.
    """
    for name, theirs in others.items():
        mine = own.get(name, theirs)
        if mine.is_parameter != theirs.is_parameter and not (mine.is_constant or theirs.is_constant):
            raise DataError(
                f"tensor {name!r} is {theirs.dtype} in {other.label} but {mine.dtype} in {base.label}; "
                "take versions of both models in floating point"
            )
