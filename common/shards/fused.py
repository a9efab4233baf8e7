"""Experts that one model stores fused and the other one by one: pieces of the fused tensor, no byte moved.

transformers 5 holds the experts of a layer as one tensor [experts, rows, columns], in which each expert's matrices
follow one another; from_pretrained puts them together, save_pretrained takes them apart again. Whoever saves the state
dict itself (torch.save, FSDP, DeepSpeed) leaves them fused.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.errors import DataError
from common.shards.headers import Tensor


@dataclass(frozen=True)
class Fused:
    """How transformers fuses experts: names end in `ending`, as they do in `parts` one by one, * being the expert's
    number.

    Fused(".experts.gate_up_proj", (".experts.*.w1.weight", ".experts.*.w3.weight")): w1's rows, then w3's, for each
    expert.
    """

    ending: str
    parts: tuple[str, ...]


def fusions(converters: Iterable) -> tuple[Fused, ...]:
    """What of transformers' weight converters stacks experts, or joins the rows of several matrices of each and stacks
    those.

    Only then is each matrix one run of bytes: what transposes or interleaves is left out.
    """
    found = []
    for one in converters:
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(one, "operations", ())]
        joined = [("MergeModulelist", 0), ("Concatenate", 1)]
        fits = steps == joined or (steps == joined[:1] and len(one.source_patterns) == 1)
        if fits and len(one.target_patterns) == 1 and all(p.count("*") == 1 for p in one.source_patterns):
            found.append(Fused(one.target_patterns[0], tuple(one.source_patterns)))
    return tuple(found)


def _apart(tensor: Tensor, fused: Fused) -> list[Tensor]:
    """[experts, rows, columns] -> a tensor [rows / parts, columns] for each part of each expert, in the order of their
    bytes."""
    experts, rows, columns = tensor.shape
    count, stem = experts * len(fused.parts), tensor.name.removesuffix(fused.ending)
    names = [stem + part.replace("*", str(expert)) for expert in range(experts) for part in fused.parts]
    shape, nbytes = (rows // len(fused.parts), columns), tensor.nbytes // max(1, count)
    return [
        replace(tensor, name=name, shape=shape, offset=tensor.offset + i * nbytes, nbytes=nbytes)
        for i, name in enumerate(names)
    ]


def taken_apart(tensors: dict[str, Tensor], known: tuple[Fused, ...], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors, fused ones as the matrices of each expert where none of the names `wanted` is fused likewise.

    {"x.experts.gate_up_proj": [2, 6, 8]} -> {"x.experts.0.w1.weight": [3, 8], "x.experts.0.w3.weight": [3, 8], …1…}
    """
    wanted, found = list(wanted), {}
    apart = [one for one in known if not any(name.endswith(one.ending) for name in wanted)]
    for name, tensor in tensors.items():
        fused = next((one for one in apart if name.endswith(one.ending)), None)
        if fused and len(tensor.shape) == 3 and tensor.shape[1] % len(fused.parts) == 0:
            found |= {piece.name: piece for piece in _apart(tensor, fused)}
        else:
            found[name] = tensor
    return found


def refuse_fused_base(base, other, known: tuple[Fused, ...]) -> None:
    """DataError where the base alone is fused: what is written has its names, and the other's matrices are apart."""
    for one in known:
        mine = next((name for name in base.tensors if name.endswith(one.ending)), None)
        before, after = one.parts[0].split("*")
        apart = any(before in name and name.endswith(after) for name in other.tensors)
        if mine and apart and not any(name.endswith(one.ending) for name in other.tensors):
            raise DataError(
                f"tensor {mine!r} of {base.label} holds the experts of a layer fused, which {other.label} stores one "
                f"by one; load {other.label} with transformers 5 and save it with save_pretrained(…, "
                "save_original_format=False)"
            )
