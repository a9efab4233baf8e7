"""Merge methods of ours for mergekit: prune and merge in one pass.

    merged = base + sum over models, in the recipe's order, of weight * mask * (model - base)

`cabs`, `magnitude` and `random` make the same masks as prune_task_vector_7b.py, bit for bit: task vectors are
rounded to `vector_dtype` as extraction does, and pruned by common.pruners in the order of the recipe's list.
The sum is formed in float32 and rounded once, by mergekit, to the recipe's out_dtype; where no mask keeps
anything the base's bits stay. mergekit-yaml cannot load these methods, merge_and_evaluate_7b.py registers them.
"""

from functools import cache, partial
from typing import Annotated

import numpy as np
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorEntry, TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from pydantic import Field

from common.errors import DataError
from common.pruners import kernels
from common.pruners.masks import Masks
from common.pruners.pruning import Pruning
from common.shards.checkpoint import open_checkpoint
from common.shards.headers import DTYPE_CODES
from common.shards.matching import mask_names
from merge_and_evaluate.sum_inputs import Block
from merge_and_evaluate.sums import vector_sum

Count = Annotated[int, Field(ge=1)]
Density = Annotated[float, Field(gt=0, le=1)]
VectorDtype = Annotated[str, Field(pattern="^(float16|bfloat16|float32)$")]
Consensus = Annotated[str, Field(pattern="^(none|sign)$")]
CABS_URL = "https://arxiv.org/abs/2503.01874"
ours = partial(
    merge_method,
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    uses_accelerator=False,  # the kernels run on the CPU
)


# --- tensors and bits -----------------------------------------------------------------------------


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a float tensor, flat: uint16 or uint32, without a copy where it is contiguous."""
    signed = torch.int32 if tensor.element_size() == 4 else torch.int16
    flat = tensor.contiguous().view(signed).flatten().numpy()
    return flat.view(np.uint32 if tensor.element_size() == 4 else np.uint16)


def _code(tensor: torch.Tensor) -> str:
    """torch.float16 -> 'F16'."""
    return DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")]


def _vector(group: TensorGroup, entry: TensorEntry, tuned: np.ndarray, base: np.ndarray, target: str) -> np.ndarray:
    """A block of a task vector from blocks of both models, as extract_task_vector_7b.py forms it."""
    code, name = _code(group.base.tensor), group.metadata.name
    vector = np.empty(base.size, kernels.BITS_DTYPE[target])
    if not kernels.subtract(tuned, code, base, code, vector, target):
        for bits, model in ((base, group.base.id), (tuned, entry.id)):
            if not kernels.all_finite(bits, code):
                raise DataError(f"tensor {name!r} of {model} holds NaN or infinity; take another model")
        raise DataError(
            f"tensor {name!r}: {entry.id} minus base is beyond the largest number of the task vector's dtype; "
            "set vector_dtype: bfloat16 or float32 under `parameters`"
        )
    return vector


# --- the merge ------------------------------------------------------------------------------------


def _merge(
    group: TensorGroup, weights: list[float], prunings: list[Pruning], vector_dtype: str, consensus: str
) -> torch.Tensor:
    """base + Σ weight · scale · mask · vector in float32; prunings, which have the scale: one a model."""
    base = group.base.tensor
    if group.metadata.name.endswith("inv_freq"):  # no parameter: carried over from the base
        return base
    target = DTYPE_CODES[vector_dtype]
    factors = tuple(weight * pruning.scale for weight, pruning in zip(weights, prunings, strict=True))
    base_bits, tuned = _bits(base), [_bits(entry.tensor) for entry in group.non_base]
    out = torch.empty_like(base, dtype=torch.float32, memory_format=torch.contiguous_format)
    out_bits = _bits(out)

    def read(j, start, stop):
        return _vector(group, group.non_base[j], tuned[j][start:stop], base_bits[start:stop], target)

    masks = Masks(prunings, _mask_name(group), [target] * len(tuned), out_bits.size, kernels)
    if masks.in_passes:
        masks.find_thresholds(masks.scanning(read), read)
    for start, stop in masks.blocks():
        vectors = [read(j, start, stop) for j in range(len(tuned))]
        block, below = Block(out_bits[start:stop], "F32"), Block(base_bits[start:stop], _code(base))
        added = [Block(vector, target) for vector in vectors]
        vector_sum(block, below, added, masks.of(start, vectors), factors, consensus == "sign")
    return out.to(base.dtype)


@cache
def _mask_names(base_path: str) -> dict[str, str]:
    return mask_names(open_checkpoint(base_path))


def _mask_name(group: TensorGroup) -> str:
    """What random masks are drawn under: the tensor's name, a tied head's embedding's."""
    name, model = group.metadata.name, group.base.id
    return _mask_names(model.model.path).get(name, name) if isinstance(model, ModelReference) else name


def _as_by_sparsity(density: float) -> float:
    """The density that --sparsity_level 1 - density comes to in float64: 0.3 -> 0.30000000000000004."""
    return 1.0 - (1.0 - density)


@ours(name="cabs", pretty_name="CABS", reference_url=CABS_URL)
def cabs(
    group: TensorGroup,
    weight: PerNonBase[float],
    n: PerNonBase[Count] = 64,
    m: PerNonBase[Count] = 256,
    conflict_aware: bool = True,
    vector_dtype: VectorDtype = "float16",
    consensus: Consensus = "none",
) -> torch.Tensor:
    """Keep n of every m, least where an earlier model of the list kept something; n and m may differ per model."""
    pairs = zip(n.values_for(group.non_base), m.values_for(group.non_base), strict=True)
    prunings = [Pruning("nm", n / m, n, m, conflict_aware=conflict_aware) for n, m in pairs]
    return _merge(group, weight.values_for(group.non_base), prunings, vector_dtype, consensus)


@ours(name="magnitude", pretty_name="Magnitude pruning", reference_url=CABS_URL)
def magnitude(
    group: TensorGroup,
    weight: PerNonBase[float],
    density: PerNonBase[Density] = 0.25,
    conflict_aware: bool = False,
    rescale: bool = False,
    vector_dtype: VectorDtype = "float16",
    consensus: Consensus = "none",
) -> torch.Tensor:
    """Keep the largest `density` of each tensor of each task vector."""
    densities = map(_as_by_sparsity, density.values_for(group.non_base))
    prunings = [Pruning("magnitude", each, conflict_aware=conflict_aware, rescale=rescale) for each in densities]
    return _merge(group, weight.values_for(group.non_base), prunings, vector_dtype, consensus)


@ours(
    name="random",
    pretty_name="Random pruning (DARE with rescale)",
    reference_url="https://arxiv.org/abs/2311.03099",
)
def random(
    group: TensorGroup,
    weight: PerNonBase[float],
    density: PerNonBase[Density] = 0.25,
    seed: int = 0,
    conflict_aware: bool = False,
    rescale: bool = False,
    vector_dtype: VectorDtype = "float16",
    consensus: Consensus = "none",
) -> torch.Tensor:
    """Keep each position with probability `density`; with `rescale` what is kept is divided by it."""
    densities = map(_as_by_sparsity, density.values_for(group.non_base))
    rule = {"seed": seed, "conflict_aware": conflict_aware, "rescale": rescale}
    prunings = [Pruning("random", each, **rule) for each in densities]
    return _merge(group, weight.values_for(group.non_base), prunings, vector_dtype, consensus)


def register() -> None:
    """Make the three known to mergekit by name, once per process, and forget the models of earlier merges."""
    _mask_names.cache_clear()
    known = {method.spec.name for method in registry.registered_methods()}
    for method in (cabs, magnitude, random):
        if method.spec.name not in known:
            registry.register(method)
