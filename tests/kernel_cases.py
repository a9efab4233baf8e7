"""Cases for the kernels: tensors full of ties, and one tensor's masks and results compared with the oracle's."""

import numpy as np
import oracle
import torch
from masks_by_block import masks_by_block

from common.pruners import kernels
from common.pruners.pruning import Pruning
from common.pruners.tally import new_counts, tallies

INTEGERS = {"F16": torch.int16, "BF16": torch.int16, "F32": torch.int32}
UNSIGNED = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}


def bits_of(tensor: torch.Tensor, code: str) -> np.ndarray:
    """The flat bit patterns of a tensor, as the kernels take them."""
    return tensor.view(INTEGERS[code]).numpy().view(UNSIGNED[code]).reshape(-1)


def tensor_of(bits: np.ndarray, code: str) -> torch.Tensor:
    """The values of bit patterns: tensor_of(np.array([0x3C00], np.uint16), "F16") -> tensor([1.])."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(oracle.DTYPES[code])


def vectors_of(kind: str, count: int, numel: int, code: str, seed: int = 0) -> list[torch.Tensor]:
    """`count` vectors: full of ties, mostly zeros of both signs, of a scale that jumps by group, or any finite bits."""
    rng = np.random.default_rng([seed, count, numel])
    out = []
    for _ in range(count):
        normal = rng.standard_normal(numel)
        if kind == "ties":
            normal = np.round(normal * 2) / 2
        if kind == "zeros":
            normal = np.where(rng.random(numel) < 0.9, np.copysign(0.0, normal), normal)
        if kind == "steps":
            normal *= np.repeat(10.0 ** rng.integers(-6, 4, numel // 256 + 1), 256)[:numel]
        tensor = torch.tensor(normal, dtype=torch.float64).to(oracle.DTYPES[code])
        if kind == "bits":
            raw = rng.integers(0, 1 << (8 * UNSIGNED[code]().itemsize), numel).astype(UNSIGNED[code])
            tensor = torch.nan_to_num(tensor_of(raw, code), nan=-0.0, posinf=1.0, neginf=-1.0)
        out.append(tensor)
    return out


def bits_with_ties(dtype: str, numel: int, seed: int, sparse: bool = False) -> np.ndarray:
    """Bits of finite values with many ties, zeros of both signs and subnormals; sparse: nine of ten are zeros."""
    numbers = np.random.default_rng(seed).standard_normal(numel).astype(np.float32)
    numbers[::3] = np.round(numbers[::3])
    numbers[::7] *= np.float32(1e-8)
    if sparse:
        numbers[np.random.default_rng(seed + 100).random(numel) < 0.9] *= 0
    if dtype == "F16":
        return numbers.astype(np.float16).view(np.uint16)
    return numbers.view(np.uint32) if dtype == "F32" else (numbers.view(np.uint32) >> 16).astype(np.uint16)


def pruning_of(method: str, n: int, m: int, aware: bool) -> Pruning:
    return Pruning(method, n / m, n, m, seed=3, conflict_aware=aware)


def our_masks(pruning: Pruning, vectors: list, code: str, name="x", block=None, engine=kernels) -> list[list[bool]]:
    """The masks of whole vectors, put together from blocks that must follow one another without a gap."""
    flat = [bits_of(vector, code) for vector in vectors]
    found, expected = [[] for _ in vectors], 0

    def read(j, start, stop):
        return engine.load(flat[j][start:stop].copy())

    for start, stop, bits, masks in masks_by_block(
        pruning, name, [code] * len(flat), flat[0].size, read, engine, block
    ):
        assert start == expected and all(len(part) == stop - start for part in bits)
        expected = stop
        for mask, part in zip(found, masks, strict=True):
            mask += np.asarray(part).astype(bool).tolist()
    assert expected == flat[0].size
    return found


def pruned(pruning, dtype, vectors, base, arithmetic, block):
    """Masks, results and counts of one tensor as an engine makes them, as numpy arrays."""
    out = []
    counts = new_counts(len(vectors))
    held = {}

    def read(j, start, stop):
        held[j] = vectors[j][start:stop].copy()
        return arithmetic.load(held[j])

    numel = base.size
    for start, stop, bits, masks in masks_by_block(
        pruning, "t", [dtype] * len(vectors), numel, read, arithmetic, block
    ):
        below = arithmetic.load(base[start:stop].copy())
        for j, mask in enumerate(masks):
            assert arithmetic.tally(bits[j], dtype, masks, j, start, pruning.m, counts)
            added, kept = np.empty((2, stop - start), UNSIGNED[dtype])
            assert arithmetic.add_kept(added, below, dtype, bits[j], dtype, mask, pruning.scale)
            assert arithmetic.keep_vector(kept, bits[j], dtype, mask, pruning.scale)
            own = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask
            out += [added, kept, own.copy()]  # or the next block's mask would take its place
    return np.concatenate([part.astype(np.uint64) for part in out]), tallies(counts, numel)


def expect_oracle(method, vectors, code, n, m, aware, block=None):
    """Compare one case with the oracle, and say which case it was."""
    ours = our_masks(pruning_of(method, n, m, aware), vectors, code, block=block)
    flat = [vector.tolist() for vector in vectors]
    theirs = oracle.ranked_masks(flat, oracle.scopes(method, len(flat[0]), n, m, n / m), aware)
    assert ours == theirs, (method, code, n, m, aware, block)
