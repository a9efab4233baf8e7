"""What sums.py is given: blocks, the rule of a tensor, and torch's order of summation, without compiled code."""

from dataclasses import dataclass
from functools import cache

import numpy as np

F16, BF16 = 0, 1
_KIND = {"F16": F16, "BF16": BF16, "F32": 2}


@dataclass(frozen=True)
class Block:
    """Some consecutive elements of a tensor: flat bits, and the dtype that they are bits of ("F16", "BF16", "F32")."""

    bits: np.ndarray
    dtype: str


@dataclass(frozen=True)
class Rule:
    """How the differences of one tensor are summed. weights and scales: one number a model, in the recipe's order.

    normalize: divide by the sum of the weights (with `elect`: of those that agree, position by position).
    elect: TIES' sign election. lambda_: the recipe's `lambda`. scales: what kept values are multiplied by (`rescale`).
    """

    weights: tuple[float, ...]
    normalize: bool = False
    lambda_: float = 1.0
    elect: bool = False
    scales: tuple[float, ...] | None = None


@cache
def _kinds(dtypes: tuple[str, ...]) -> np.ndarray:
    return np.array([_KIND[dtype] for dtype in dtypes], np.int64)


def kinds_of(*blocks: Block) -> np.ndarray:
    """What the kernels know dtypes by, int64 [blocks]: compiled once for any number and any dtypes of models."""
    return _kinds(tuple([block.dtype for block in blocks]))


def in_order(numel: int) -> int:
    """How many leading elements of a tensor torch sums in plain order; the rest in four interleaved sums."""
    return numel // 32 * 32 if numel >= 8 else numel // 4 * 4


def _interleaved(numbers: np.ndarray) -> np.float32:
    """The sum of a column in four interleaved sums: a tensor's last elements, and weights."""
    whole, parts = len(numbers) // 4 * 4, [np.float32(0)] * 4
    for i, number in enumerate(numbers):
        lane = i % 4 if i < whole else 0
        parts[lane] = parts[lane] + number
    return parts[0] + parts[1] + parts[2] + parts[3]


def sum_of_weights(weights: tuple[float, ...]) -> np.float32:
    """The sum of the weights as torch forms it in float32: interleaved up to 7, eight lanes at a time from there on."""
    numbers = np.array(weights, np.float32)
    whole = len(numbers) // 8 * 8
    if not whole:
        return _interleaved(numbers)
    lanes = numbers[:whole].reshape(-1, 8)
    total = np.float32(0)
    for number in [*numbers[whole:], *(_interleaved(lane) for lane in lanes.T)]:
        total = total + number
    return total
