"""Names of two models' tensors made to agree: as the architecture has them now, without what wraps either."""

from collections import Counter
from dataclasses import dataclass

from common.shards.architecture import Architecture, architecture
from common.shards.checkpoint import Checkpoint
from common.shards.fused import refuse_fused_base, taken_apart
from common.shards.headers import Tensor
from common.shards.names import unwrapped


@dataclass(frozen=True)
class Names:
    """Both models' tensors under names that agree: {name: base's tensor}, {name: other's}, and who said so."""

    mine: dict[str, Tensor]
    theirs: dict[str, Tensor]
    known: Architecture | None
    notes: tuple[str, ...] = ()


def _by_key(tensors: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    """{key: tensor}; of several tensors of one key the one that is called so, or else all under their own names."""
    count = Counter(keys.values())
    return {(keys[name] if count[keys[name]] == 1 else name): tensor for name, tensor in tensors.items()}


def _agree(base: Checkpoint, other: Checkpoint) -> bool:
    """Whether every parameter of each is one of the other by the same name."""
    mine, theirs = ({n for n, t in c.tensors.items() if t.is_parameter} for c in (base, other))
    return mine <= other.tensors.keys() and theirs <= base.tensors.keys()


def resolve(base: Checkpoint, other: Checkpoint) -> Names:
    """Names that agree as far as they can: as the architecture has them now, without what wraps either model."""
    if _agree(base, other):
        return Names(base.tensors, other.tensors, None)
    known = architecture(base.config) or architecture(other.config)
    key = known.name_of if known else str
    notes, keys, stored = [], {name: key(name) for name in base.tensors}, other.tensors
    if known and known.fused:
        refuse_fused_base(base, other, known.fused)
        stored = taken_apart(other.tensors, known.fused, base.tensors)
    # The other first, against the base's own names: what wraps the base is taken off only to compare, outputs keep it.
    theirs, wrapper = unwrapped(stored, key, set(keys.values()))
    if wrapper:
        notes.append(f"{other.label}: {wrapper!r} was taken off its tensors' names")
    keys, own = unwrapped(base.tensors, key, set(theirs.values()))
    if own:
        notes.append(f"{base.label}: {own!r} was taken off its tensors' names to compare them; outputs keep it")
    found = Names(_by_key(base.tensors, keys), _by_key(stored, theirs), known)
    if len(stored) > len(other.tensors):
        split = len(other.tensors.keys() - stored.keys())
        notes.append(f"{split} tensors of {other.label} hold the experts of a layer fused; they are read one by one")
    renamed = [n for n in found.mine.keys() & found.theirs if found.mine[n].name != found.theirs[n].name]
    if renamed and not wrapper and not own:
        pair = min((found.mine[n].name, found.theirs[n].name) for n in renamed)
        notes.append(
            f"{len(renamed)} tensors have other names in {other.label}, the same to {known.name}: "
            f"{pair[1]} is {pair[0]} in {base.label}"
        )
    return Names(found.mine, found.theirs, known, tuple(notes))


def names_in(base: Checkpoint, names: list[str]) -> dict[str, str]:
    """{name: the base's name of the same tensor}, as far as they are found: as they are, renamed, unwrapped."""
    if all(name in base.tensors for name in names):
        return {name: name for name in names}
    known = architecture(base.config)
    key = known.name_of if known else str
    mine = {key(name): name for name in base.tensors}
    keys, _ = unwrapped(names, key, set(mine))
    return {name: mine[found] for name, found in keys.items() if found in mine}
