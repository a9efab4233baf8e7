"""The kernels in torch, for a GPU: the same rules, the same bits as common.pruners.kernels.

Arrays are flat tensors on one device: int16 bits of float16 and bfloat16, int32 bits of float32, masks uint8.
Every step is an exact integer operation or a single correctly rounded float32 one, so nothing depends on the
device (the report's sums of squares may differ in digits that it does not print).
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from common.errors import DataError
from common.pruners.kernels import BLOCK, ENGINE, MAGNITUDE_BITS

_FLOAT = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
# Elements. A GPU needs many at once to be busy, and each step is a launch; a thread holds a block of every input in its
# memory, with keys of 4 or 8 bytes.
_BLOCK_ON_GPU = 1 << 22


def load(bits, device):
    """numpy's unsigned bits on the device, as signed ones: torch compares and shifts no unsigned integers but bytes."""
    return torch.from_numpy(bits.view(f"int{8 * bits.itemsize}")).to(device)


def empty_masks(vectors: int, size: int, device):
    """Room for the masks of a block: uint8 [vectors, size]."""
    return torch.empty((vectors, size), dtype=torch.uint8, device=device)


def _magnitudes(bits, dtype):
    """Magnitudes as keys hold them: twice as wide as the bits, so that no key reaches the sign."""
    wide = torch.int64 if dtype == "F32" else torch.int32
    return bits.to(wide) & ((1 << MAGNITUDE_BITS[dtype]) - 1)


def _keys(bits, dtype, taken, levels):
    """What ranks a position (see common.pruners.kernels.ranking)."""
    keys = _magnitudes(bits, dtype)
    return keys if not levels else keys | (levels - taken.to(keys.dtype)) << MAGNITUDE_BITS[dtype]


def _keep_largest(keys, k: int, key_bits: int):
    """Mask of the k largest in each row of keys [groups, m]; among equal keys the first. -> bool [groups, m]

    Bit by bit, as the kernel for small m does: topk does not say which of equal keys it takes, and a sort takes longer.
    """
    threshold = torch.zeros_like(keys[:, :1])
    for bit in range(key_bits - 1, -1, -1):
        candidate = threshold | (1 << bit)
        reached = (keys >= candidate).sum(1, keepdim=True, dtype=torch.int32) >= k
        threshold = torch.where(reached, candidate, threshold)
    above, ties = keys > threshold, keys == threshold
    left = k - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (ties & (ties.cumsum(1, dtype=torch.int32) <= left))


def nm_mask(mask, bits, dtype, taken, levels, n, m) -> None:
    """mask = those of n of every m consecutive elements that are not zero; a last group of r has ceil(n*r/m)."""
    keys = _keys(bits, dtype, taken, levels)
    key_bits = MAGNITUDE_BITS[dtype] + levels.bit_length()
    full = bits.numel() // m * m
    if full:
        mask[:full] = _keep_largest(keys[:full].view(-1, m), n, key_bits).view(-1)
    if full < bits.numel():
        rest = bits.numel() - full
        mask[full:] = _keep_largest(keys[full:].view(1, -1), -(-n * rest // m), key_bits).view(-1)
    drop_zeros(mask, bits, dtype)


def drop_zeros(mask, bits, dtype) -> None:
    """In place: mask where the values are not zero."""
    mask &= _magnitudes(bits, dtype) != 0


def keys_of(bits, dtype, taken, levels) -> np.ndarray:
    """int64 [elements], in numpy: the key of each position."""
    return _keys(bits, dtype, taken, levels).to(torch.int64).cpu().numpy()


def count_keys(counts, above, bits, dtype, taken, levels, low, high, shift) -> None:
    """Add to numpy's `counts` how many keys are in each bin from `low` to below `high`, to `above` how many are
    above."""
    found = _keys(bits, dtype, taken, levels).to(torch.int64)
    near = found[(found >= low) & (found < high)]
    counts += torch.bincount((near - low) >> shift, minlength=counts.size).cpu().numpy()
    above += int((found >= high).sum())


def threshold_mask(mask, bits, dtype, taken, levels, least, ties) -> None:
    """mask = keys above `least` and the first ties[0] that equal it, but for zeros; numpy's `ties` is counted down."""
    keys = _keys(bits, dtype, taken, levels)
    tied = keys == least
    mask[:] = (keys > least) | (tied & (tied.cumsum(0) <= ties[0]))
    drop_zeros(mask, bits, dtype)
    ties -= min(ties[0], int(tied.sum()))


def count_taken(taken, before, mask) -> None:
    """taken = before + mask."""
    torch.add(before, mask, out=taken)


def _draws(start, count, key, device):
    """int64 [count]: Philox4x32-10 words of positions start, start + 1, … (see common.pruners.kernels.philox)."""
    low = 0xFFFFFFFF
    counter = torch.arange(start // 4, start // 4 - (-count // 4), dtype=torch.int64, device=device)
    c = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = key & low, key >> 32
    for _ in range(10):
        # A product of 32-bit words wraps in int64 but keeps its 64 bits; the mask undoes the signed shift.
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & low) ^ c[1] ^ k0, b & low, (a >> 32 & low) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack(c, 1).view(-1)[:count]


def random_mask(mask, start, key, taken, limits) -> None:
    """mask[i] = whether the draw of position start + i is below limits[taken[i]]; zeros are left out by drop_zeros."""
    numbers = _draws(start, mask.numel(), key, mask.device)
    table = torch.tensor(limits, dtype=torch.int64, device=mask.device)
    mask[:] = numbers < (table[taken.long()] if len(limits) > 1 else table)


def all_finite(bits, dtype) -> bool:
    """Whether there is no NaN and no infinity among values of `dtype`."""
    return int(_magnitudes(bits, dtype).max()) < _INFINITY[dtype]


def _store(out, values, dtype) -> bool:
    """Copy bits of `dtype` to a numpy array -> whether all are finite."""
    finite = all_finite(values, dtype)
    torch.from_numpy(out.view(f"int{8 * out.itemsize}")).copy_(values)
    return finite


def add_kept(out, base, base_dtype, vector, vector_dtype, mask, scale) -> bool:
    """out, in numpy = round(base + scale * vector) where mask keeps, in float32; elsewhere base's own bits."""
    scaled = vector.view(_FLOAT[vector_dtype]).float() * np.float32(scale).item()
    total = (base.view(_FLOAT[base_dtype]).float() + scaled).to(_FLOAT[base_dtype])
    return _store(out, torch.where(mask.bool(), total.view(base.dtype), base), base_dtype)


def keep_vector(out, vector, dtype, mask, scale) -> bool:
    """out, in numpy = round(scale * vector) where mask keeps, +0.0 elsewhere -> whether all of it is finite."""
    scaled = (vector.view(_FLOAT[dtype]).float() * np.float32(scale).item()).to(_FLOAT[dtype])
    return _store(out, torch.where(mask.bool(), scaled.view(vector.dtype), torch.zeros_like(vector)), dtype)


def _tally_groups(mask, at, m, counts) -> None:
    """Count what is kept in each whole group of m: first what closes the open one, then whole ones, then the rest."""
    first = min(-at % m, mask.numel())  # where in this block the first group begins that is not open already
    counts["tail"] += int(mask[:first].sum())
    if at % m and (at + first) % m == 0:
        counts["groups"] += 1
        counts["squares"] += counts["tail"] ** 2
        counts["tail"] = 0
    if first < mask.numel():
        whole = mask[first : first + (mask.numel() - first) // m * m].view(-1, m).sum(1, dtype=torch.int64)
        counts["groups"] += whole.numel()
        counts["squares"] += int((whole * whole).sum())
        counts["tail"] += int(mask[first + whole.numel() * m :].sum())


def tally(vector, dtype, masks, j, at, m, counts) -> bool:
    """Add one block of vector number j and its mask to counts[j], in numpy (see common.pruners.kernels.arithmetic)."""
    own, values = counts[j], vector.view(_FLOAT[dtype])
    squares = (values.cpu() if values.device.type == "mps" else values).double().square_()  # mps has no float64
    own["energy"] += float(squares.sum())
    own["energy_kept"] += float((squares * masks[j].to(squares.device)).sum())
    own["nonzero"] += int((_magnitudes(vector, dtype) != 0).sum())
    own["kept"] += int(masks[j].sum(dtype=torch.int64))
    for i, mask in enumerate(masks[:j]):
        own["both"][i] += int((mask & masks[j]).sum(dtype=torch.int64))
    _tally_groups(masks[j], at, m, own)
    return all_finite(vector, dtype)


def engine(device: str) -> SimpleNamespace:
    """The functions of ENGINE on a torch device. Raises DataError where torch has no such device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"--device {device}: not usable here ({reason:.120}); use --device cpu, or a torch built for it"
        ) from None
    functions = {name: globals()[name] for name in ENGINE}
    functions |= {name: partial(functions[name], device=device) for name in ("load", "empty_masks")}
    block = BLOCK if torch.device(device).type == "cpu" else _BLOCK_ON_GPU
    return SimpleNamespace(BLOCK=block, MAGNITUDE_BITS=MAGNITUDE_BITS, **functions)
