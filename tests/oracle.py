"""What the scripts promise, computed slowly and plainly. Nothing of common/ is used.

Tensors are torch tensors, as safetensors or torch load them; masks are lists of bools over the flattened tensor.
"""

import math
from fractions import Fraction

import numpy as np
import torch
import xxhash

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


# --- convert, extract ---------------------------------------------------------------------------


def convert(tensor: torch.Tensor, dtype: torch.dtype, clamp: bool = False) -> torch.Tensor:
    """Rounded to nearest even, by torch; with `clamp` what is beyond the largest finite value becomes it."""
    out = tensor.to(dtype)
    if clamp:
        largest = torch.finfo(dtype).max
        out = torch.where(out.isinf(), torch.full_like(out, largest) * out.sign(), out)
    return out


def extract(finetuned: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Both sides rounded to dtype, subtracted in float32, rounded once."""
    return (finetuned.to(dtype).float() - base.to(dtype).float()).to(dtype)


# --- which positions are kept -------------------------------------------------------------------


def scopes(method: str, numel: int, n: int, m: int, density: float) -> list[tuple[int, int, int]]:
    """[(start, stop, k)]: groups of m with a last one of r that keeps ceil(n*r/m), or the whole tensor."""
    if method == "magnitude":
        return [(0, numel, round(density * numel))]
    found = []
    for start in range(0, numel, m):
        size = min(m, numel - start)
        found.append((start, start + size, n if size == m else math.ceil(Fraction(n * size, m))))
    return found


def ranked_masks(vectors: list[list[float]], scopes: list[tuple], conflict_aware: bool) -> list[list[bool]]:
    """Sort every scope by (fewest earlier keepers, larger magnitude, lower index); keep the first k, but no zeros.

    ranked_masks([[1, -3, 2, 2]], [(0, 4, 2)], True) -> [[False, True, True, False]]
    ranked_masks([[0, -3, 0], [9, 8, 7]], [(0, 3, 2)], True) -> [[False, True, False], [True, False, True]]
    """
    keepers, masks = [0] * len(vectors[0]), []
    for vector in vectors:
        mask = [False] * len(vector)
        for start, stop, k in scopes:

            def place(i, vector=vector, keepers=keepers):
                return (keepers[i] if conflict_aware else 0, -abs(vector[i]), i)

            for i in sorted(range(start, stop), key=place)[:k]:
                mask[i] = vector[i] != 0
        keepers = [count + kept for count, kept in zip(keepers, mask, strict=True)]
        masks.append(mask)
    return masks


def philox(counter: list, key: list) -> list:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from four of counter and two of key.

    Works on Python integers and on uint64 arrays alike.
    """
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for step in range(10):
        if step:
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
    return c


def draws(count: int, key: int) -> np.ndarray:
    """uint32 numbers of positions 0, 1, …: position p is word p % 4 of the block with counter p // 4."""
    blocks = np.arange(math.ceil(count / 4), dtype=np.uint64)
    none = np.zeros_like(blocks)
    words = philox([blocks, none, none, none], [key & 0xFFFFFFFF, key >> 32])
    return np.stack(words, axis=1).reshape(-1)[:count]


def random_chances(density: float, vectors: int, conflict_aware: bool) -> list[list[Fraction]]:
    """For each vector: the chance to keep a position, by how many earlier vectors kept it.

    Conflict-aware, every vector fills its density from the least contested positions up.
    """
    density = Fraction(density)
    if not conflict_aware:
        return [[density] * (j + 1) for j in range(vectors)]
    share = {0: Fraction(1)}  # of the positions, by how many vectors keep them
    chances = []
    for j in range(vectors):
        wanted, row, after = density, [], {c: Fraction(0) for c in range(j + 2)}
        for c in range(j + 1):
            have = share.get(c, Fraction(0))
            use = min(have, wanted)
            wanted -= use
            row.append(use / have if have else Fraction(0))
            after[c] += have - use
            after[c + 1] += use
        share = after
        chances.append(row)
    return chances


def random_draws(
    numel: int, vectors: int, density: float, conflict_aware: bool, seed: int, name: str
) -> list[list[bool]]:
    """Vector j draws position i where its number is below chance * 2**32; j's key is xxh3_64 of "seed/j/name".

    Whatever the values are: a drawn zero is taken for the vectors that follow, and only then left out of the mask.
    """
    drawn, found = [0] * numel, []
    for j, row in enumerate(random_chances(density, vectors, conflict_aware)):
        limits = [round(chance * 2**32) for chance in row]
        numbers = draws(numel, xxhash.xxh3_64_intdigest(f"{seed}/{j}/{name}".encode())).tolist()
        hits = [number < limits[count] for number, count in zip(numbers, drawn, strict=True)]
        drawn = [count + hit for count, hit in zip(drawn, hits, strict=True)]
        found.append(hits)
    return found


def random_masks(vectors: list[list[float]], *rule) -> list[list[bool]]:
    """What is drawn (rule: density, conflict_aware, seed, name) and not zero."""
    drawn = random_draws(len(vectors[0]), len(vectors), *rule)
    return [[hit and value != 0 for hit, value in zip(*pair, strict=True)] for pair in zip(drawn, vectors, strict=True)]


def masks(
    vectors: list[torch.Tensor], name: str, method="nm", n=64, m=256, sparsity_level=0.75, conflict_aware=None, seed=0
) -> list[list[bool]]:
    """The masks of one tensor of every vector, in order; `name` is what random draws under."""
    aware = (method == "nm") if conflict_aware is None else conflict_aware
    density = 1.0 - sparsity_level
    flat = [vector.flatten().tolist() for vector in vectors]
    if method == "random":
        return random_masks(flat, density, aware, seed, name)
    return ranked_masks(flat, scopes(method, len(flat[0]), n, m, density), aware)


# --- what is written ----------------------------------------------------------------------------


def scale_of(method: str, n: int, m: int, sparsity_level: float, rescale: bool) -> torch.Tensor:
    """1/density as a float32, or 1 without rescale."""
    density = n / m if method == "nm" else 1.0 - sparsity_level
    return torch.tensor(1.0 / density if rescale else 1.0, dtype=torch.float32)


def _keep(mask: list[bool], where: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.tensor(mask, dtype=torch.bool).reshape(where.shape), where, elsewhere)


def model_tensor(base: torch.Tensor, vector: torch.Tensor, mask: list[bool], scale) -> torch.Tensor:
    """round(base + scale * vector) where the mask keeps, computed in float32; elsewhere the base's own bits."""
    return _keep(mask, (base.float() + vector.float() * scale).to(base.dtype), base)


def vector_tensor(vector: torch.Tensor, mask: list[bool], scale) -> torch.Tensor:
    """round(scale * vector) where the mask keeps, +0.0 elsewhere."""
    return _keep(mask, (vector.float() * scale).to(vector.dtype), torch.zeros_like(vector))


# --- comparing ----------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that -0.0 differs from +0.0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))
