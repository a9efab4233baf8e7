"""What a streamed merge must come to, slowly: numpy and Python loops, one element at a time; no code of ours.

Values are float32 numbers in lists; every operation is done in np.float32, which rounds it once.
"""

from fractions import Fraction

import numpy as np

F = np.float32


def to_values(array: np.ndarray, dtype: str) -> list:
    """Bits of a dtype -> float32 numbers."""
    if dtype == "F16":
        return [F(x) for x in array.view(np.float16)]
    if dtype == "BF16":
        return [np.array([int(x) << 16], np.uint32).view(np.float32)[0] for x in array]
    return list(array.view(np.float32))


def to_bits(value, dtype: str) -> int:
    """A float32 number -> bits of a dtype, to nearest even; bfloat16 by looking at both neighbours."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return int(np.array([value], np.float32).astype(np.float16).view(np.uint16)[0])
    word = int(np.array([value], np.float32).view(np.uint32)[0])
    if dtype == "F32":
        return word
    low, rest = word >> 16, word & 0xFFFF
    up = rest > 0x8000 or (rest == 0x8000 and low % 2 == 1)
    return low + up


def fused(a, b, c):
    """a·b + c with one rounding: exact fractions, then the nearest float32."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return F(F(a) * F(b) + F(c))  # the sign of a zero
    near = F(float(exact))  # right but for double rounding: look at the neighbours as well
    found = [near, np.nextafter(near, F(np.inf)), np.nextafter(near, F(-np.inf))]
    found = [x for x in found if np.isfinite(x)]
    return min(found, key=lambda x: (abs(Fraction(float(x)) - exact), int(np.array([x]).view(np.uint32)[0]) % 2))


def torch_sum(numbers: list, plain: bool):
    """k numbers as torch's sum(dim=0) adds them: one after the other, or as four interleaved sums (a tensor's tail)."""
    if plain:
        total = F(0)
        for number in numbers:
            total = total + number
        return total
    parts, whole = [F(0)] * 4, len(numbers) // 4 * 4
    for i, number in enumerate(numbers):
        lane = i % 4 if i < whole else 0
        parts[lane] = parts[lane] + number
    return parts[0] + parts[1] + parts[2] + parts[3]


def plain_columns(numel: int) -> int:
    return numel - numel % 32 if numel >= 8 else numel - numel % 4


def linear(models: list[list], weights, normalize: bool) -> list:
    weights = [F(w) for w in weights]
    divisor = torch_sum(weights, plain=False) if normalize else F(1)
    out = []
    for values in zip(*models, strict=True):
        total = F(0)
        for value, weight in zip(values, weights, strict=True):
            total = fused(value, weight, total)
        out.append(total / divisor)
    return out


def delta_sum(base, models, weights, masks=None, scales=None, normalize=False, scale=1.0, elect=False) -> list:
    """mergekit's task arithmetic, TIES and DARE; a change of zero keeps the base's own sign of zero."""
    weights, out = [F(w) for w in weights], []
    for i, below in enumerate(base):
        plain, terms = i < plain_columns(len(base)), []
        for j, model in enumerate(models):
            term = model[i] - below
            term = F(0) if masks is not None and not masks[j][i] else term
            terms.append(term * F(scales[j] if scales else 1) * weights[j])
        total = torch_sum(terms, plain)
        divisor = torch_sum(weights, plain=False)
        divisor = F(1) if abs(divisor) < 1e-8 else divisor
        if elect:
            sign = 1 if total >= 0 else -1
            agree = [np.sign(term) == sign for term in terms]
            total = torch_sum([t if a else F(0) for t, a in zip(terms, agree, strict=True)], plain)
            divisor = torch_sum([w if a else F(0) for w, a in zip(weights, agree, strict=True)], plain)
            divisor = F(1) if divisor == 0 else divisor
        change = (total / divisor if normalize else total) * F(scale)
        out.append(below if change == 0 else below + change)
    return out


def vector_sum(base, vectors, masks, weights, consensus: bool) -> list:
    """Our methods: base + what masks keep, one after the other, or the mean of those of the elected sign."""
    out = []
    for i, below in enumerate(base):
        terms = [F(w) * v[i] for w, v, m in zip(weights, vectors, masks, strict=True) if m[i]]
        if not consensus:
            for term in terms:
                below = below + term
        elif terms:
            total = F(0)
            for term in terms:
                total = total + term
            chosen = [t for t in terms if (t > 0 if total >= 0 else t < 0)]
            mean = F(0)
            for term in chosen:
                mean = mean + term
            below = below + mean / F(len(chosen)) if chosen else below
        out.append(below)
    return out


def ties_mask(delta: list, density: float) -> list[int]:
    """The k largest magnitudes, among equals the first; k = max(1, int(density · numel))."""
    if density >= 1:
        return [1] * len(delta)
    k = max(1, int(density * len(delta))) if density > 0 else 0
    kept = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))[:k]
    return [int(i in kept) for i in range(len(delta))]
