"""Which tensors of two models belong together, from headers alone; which are tied."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import DataError
from common.shards.architecture import architecture
from common.shards.checkpoint import Checkpoint
from common.shards.dtypes import check_floats, check_kinds
from common.shards.headers import Tensor
from common.shards.leftover import check_skip, refuse_left_over, skipped
from common.shards.names import left_over
from common.shards.resolving import Names, resolve

# Of models that transformers does not know, or that need not be asked about.
EMBEDDING_ENDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
HEAD_ENDINGS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Match:
    """Which tensor of another model belongs to which of the base's.

    A parameter of the base without a pair was left out (--skip, or of no use to the architecture): it keeps its bits.
    """

    pairs: dict[str, Tensor]  # {base's name: the other's tensor}
    notes: tuple[str, ...] = ()  # what was resolved or left out, for people
    # {base's name: tensors that the other spells out as tied to it}: dropped, if their bytes are those of its pair
    equal: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


# --- ties -----------------------------------------------------------------------------------------


def _ends(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.endswith(endings)), None)


def _ties_in_config(config: dict) -> bool | None:
    """Whether config.json ties the output head to the input embedding; None if it does not say."""
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and isinstance(section.get("tie_word_embeddings"), bool):
            return section["tie_word_embeddings"]
    return None


def says_tied(checkpoint: Checkpoint) -> bool:
    """Whether config.json ties the output head to the input embedding (its architecture's default if silent)."""
    said = _ties_in_config(checkpoint.config)
    if said is not None:
        return said
    # Most configs say it; transformers, which is slow to import, is asked only about the others.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = checkpoint.config.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return bool(known and getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False))


def _ties_by_name(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """{head: embedding, embedding: embedding} where config.json ties them, judged by the endings of their names."""
    names = list(names)
    head, embedding = _ends(names, HEAD_ENDINGS), _ends(names, EMBEDDING_ENDINGS)
    if head is None or embedding is None or not says_tied(checkpoint):
        return {}
    return {head: embedding, embedding: embedding}


def _vocabulary_sizes(config: dict) -> set[int]:
    """Every vocab_size in a config, nested ones included."""
    nested = (_vocabulary_sizes(value) for value in config.values() if isinstance(value, dict))
    return set().union({config["vocab_size"]} if type(config.get("vocab_size")) is int else (), *nested)


def _may_spell_out_ties(checkpoint: Checkpoint) -> bool:
    """Whether a model holds more tensors of the vocabulary's size than one that ties nothing.

    That is an embedding, and a head where config.json says that it is not tied: such a model asks nobody.
    """
    sizes = _vocabulary_sizes(checkpoint.config)
    shapes = Counter(t.shape for t in checkpoint.tensors.values() if t.shape and t.shape[0] in sizes)
    return max(shapes.values(), default=0) > (2 if _ties_in_config(checkpoint.config) is False else 1)


def mask_names(base: Checkpoint) -> dict[str, str]:
    """{tensor: the name its random mask is drawn under}, one for all tensors that are tied.

    T5 with shared, encoder and decoder embed_tokens and lm_head spelled out: 'shared.weight' for all four.
    """
    names, known = {name: name for name in base.tensors}, None
    if _may_spell_out_ties(base):
        known = architecture(base.config)
    if known is None:
        for name, first in _ties_by_name(base, base.tensors).items():
            if base.tensors[name].shape == base.tensors[first].shape:
                names[name] = first
        return names
    drawn: dict[tuple, str] = {}
    for name, tensor in base.tensors.items():
        first = known.ties.get(known.name_of(name))
        if first is not None:
            # The embedding's own name where the model spells it out, so that a copy without the head draws the same.
            drawn.setdefault((first, tensor.shape), name)
            if known.name_of(name) == first:
                drawn[first, tensor.shape] = name
    for name, tensor in base.tensors.items():
        names[name] = drawn.get((known.ties.get(known.name_of(name)), tensor.shape), name)
    return names


# --- refusals -------------------------------------------------------------------------------------


def vocabulary_names(base: Checkpoint, names: Iterable[str]) -> set[str]:
    """Those of the base's `names` that have a row for each token: embeddings, output head, its bias."""
    known = architecture(base.config)
    if known is None:
        return {name for name in names if name.endswith(EMBEDDING_ENDINGS + HEAD_ENDINGS)}
    return {name for name in names if known.name_of(name) in known.vocabulary}


def row_axis(shape: tuple[int, ...]) -> int:
    """The axis of a vocabulary's rows, the first longer than 1: 0 of [32000, 4096], 1 of BART's [1, 50265]."""
    return next((axis for axis, size in enumerate(shape) if size > 1), 0)


def _differ_in_rows(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two shapes differ in their number of rows alone."""
    axis = row_axis(mine.shape)
    cut = [tensor.shape[:axis] + tensor.shape[axis + 1 :] for tensor in (mine, theirs)]
    return cut[0] == cut[1] and len(mine.shape) == len(theirs.shape) > 0


def check_shapes(base: Checkpoint, other: Checkpoint, pairs: dict[str, Tensor], free: Iterable[str]) -> None:
    """Refuse pairs of unequal shape; the vocabulary's tensors among `free` may differ in their number of rows."""
    free = vocabulary_names(base, free) if free else ()
    unequal = [
        name
        for name, theirs in pairs.items()
        if base.tensors[name].shape != theirs.shape
        and not (name in free and _differ_in_rows(base.tensors[name], theirs))
    ]
    if not unequal:
        return
    mine, theirs = base.tensors[unequal[0]], pairs[unequal[0]]
    line = f"tensor {mine.name!r} is {list(theirs.shape)} in {other.label} but {list(mine.shape)} in {base.label}; "
    if _differ_in_rows(mine, theirs) and vocabulary_names(base, [mine.name]):
        raise DataError(
            f"{line}the vocabularies differ: extract with --vocabulary common, which subtracts the rows of the tokens "
            f"that both have and keeps {base.label}'s tokenizer, or take a fine-tuned model with {base.label}'s own"
        )
    raise DataError(f"{line}is {other.label} a fine-tuned model of {base.label}?")


# --- pairs ----------------------------------------------------------------------------------------


def _ties(names: Names, checkpoint: Checkpoint, own: dict[str, Tensor]) -> dict[str, str]:
    """{name: first of its tie group} as `checkpoint` has them, over the names that agree."""
    known = architecture(checkpoint.config) if names.known else None
    return known.ties if known else _ties_by_name(checkpoint, [*own, *(n for n in names.mine if n not in own)])


def _stand_in(name: str, names: Names, ties: dict[str, str]) -> Tensor | None:
    """The tensor of the other model to which it ties `name`, which it does not spell out."""
    group = (n for n, first in ties.items() if n != name and first == ties.get(name))
    return next((names.theirs[n] for n in group if n in names.theirs), None)


def _tied_to(name: str, names: Names, ties: list[dict[str, str]]) -> str | None:
    """The name, among the base's, of the tensor to which `name`, which only the other model spells out, is tied."""
    for groups in ties:
        same = [n for n, first in groups.items() if first == groups.get(name) and n in names.mine]
        if name in groups and same:
            return same[0]
    return None


@dataclass(frozen=True)
class _Sorted:
    """Where each tensor went, filled by the two functions below; lists of names are the tensors' own."""

    pairs: dict[str, Tensor] = field(default_factory=dict)
    equal: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)
    only_base: list[str] = field(default_factory=list)
    only_other: list[str] = field(default_factory=list)


def _pair_parameters(names: Names, other: Checkpoint, skip: tuple[str, ...], to: _Sorted) -> None:
    """The base's parameters: paired by name, or with the tensor to which the other ties what it does not store."""
    missing = any(tensor.is_parameter and name not in names.theirs for name, tensor in names.mine.items())
    ties = _ties(names, other, names.theirs) if missing else {}
    for name, mine in names.mine.items():
        if not mine.is_parameter:
            continue
        theirs = names.theirs.get(name)
        if skipped(skip, mine.name, *([theirs.name] if theirs else [])):
            to.left_out.add(mine.name)
        elif theirs := theirs or _stand_in(name, names, ties):
            to.pairs[mine.name] = theirs
        else:
            drops = names.known and names.known.drops(name)
            (to.unused if drops else to.only_base).append(mine.name)


def _sort_extra(names: Names, base: Checkpoint, other: Checkpoint, skip: tuple[str, ...], to: _Sorted) -> None:
    """Parameters that the other model alone stores: tied to one of the base's, left out, of no use, or too many."""
    extra = [name for name, tensor in names.theirs.items() if tensor.is_parameter and name not in names.mine]
    ties = [_ties(names, base, names.mine), _ties(names, other, names.theirs)] if extra else []
    for name in extra:
        theirs, first = names.theirs[name], _tied_to(name, names, ties)
        target = names.mine[first].name if first else None
        if skipped(skip, theirs.name):
            to.left_out.add(theirs.name)
        elif target in to.pairs and theirs.shape == to.pairs[target].shape:
            to.equal[target] = (*to.equal.get(target, ()), theirs)
        else:
            drops = names.known and names.known.drops(name)
            (to.unused if drops else to.only_other).append(theirs.name)


def match_all(
    base: Checkpoint, others: list[Checkpoint], skip: tuple[str, ...], free_rows: bool = False
) -> list[Match]:
    """match() of each. Raises DataError for a pattern of `skip` that names nothing in any of them: a typing error."""
    found = [match(base, other, skip, free_rows) for other in others]
    check_skip(base, others, skip)
    return found


def match(base: Checkpoint, other: Checkpoint, skip: tuple[str, ...] | None = None, free_rows: bool = False) -> Match:
    """Pair every parameter of `base` with `other`'s tensor, by name; see Match.

    skip: patterns (fnmatch) of names, of either model, that are left out; None where the caller has no such flag to
    advise. free_rows: tensors with a row for each token may differ in their number of rows. Raises DataError that
    counts what is missing or left over, by pattern, or names the first tensor of another shape.
    """
    # Before names are compared: a quantised model, or one of another kind, has other names as well, and the reason
    # says more than the names do.
    check_floats(other)
    names, found = resolve(base, other), _Sorted()
    check_kinds(base, other, names.mine, names.theirs)
    _pair_parameters(names, other, skip or (), found)
    _sort_extra(names, base, other, skip or (), found)
    refuse_left_over(base, other, found.pairs, (found.only_base, found.only_other), skip)
    check_shapes(base, other, found.pairs, found.pairs if free_rows else ())
    notes = list(names.notes)
    if found.unused:
        what, _ = left_over(found.unused, [*found.pairs, *(t.name for t in found.pairs.values())])
        notes.append(f"{names.known.name} does without {what}: left as in {base.label}")
    if found.left_out:
        count = f"{len(found.left_out)} tensor{'s' * (len(found.left_out) > 1)}"
        notes.append(f"left out by --skip: {count}; {base.label}'s keep their bits")
    notes += [*_tie_notes(base, other, found.equal), *_constant_notes(base, other)]
    return Match(found.pairs, tuple(notes), found.equal)


def _tie_notes(base: Checkpoint, other: Checkpoint, equal: dict[str, tuple[Tensor, ...]]) -> list[str]:
    return [
        f"{extra.name} of {other.label} is tied to {name} in {base.label}, and left out if it holds the same bytes"
        for name, extras in equal.items()
        for extra in extras
    ]


def _constant_notes(base: Checkpoint, other: Checkpoint) -> list[str]:
    """What is said of constants that only one model holds."""
    mine, theirs = ({n for n, t in c.tensors.items() if t.is_constant} for c in (base, other))
    notes = []
    for one, names in ((base, mine - theirs), (other, theirs - mine)):
        if names and not (mine and theirs):
            what, _ = left_over(sorted(names), [n for n, t in one.tensors.items() if t.is_parameter])
            notes.append(f"constants, no weights, in {one.label} alone: {what}; outputs have the base's")
    return notes
