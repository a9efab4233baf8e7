"""Two ways to name the same tensors: wrappers found, patterns for what is left over. Names only, no files."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from glob import escape

SAMPLE = 500  # names from which a wrapper is guessed; it is then tried on all
SHOWN = 4  # patterns in an error's line


def parts_from_the_right(name: str) -> Iterable[tuple[str, str]]:
    """'a.b.c' -> ('', 'a.b.c'), ('a.', 'b.c'), ('a.b.', 'c')."""
    parts = name.split(".")
    for i in range(len(parts)):
        head = ".".join(parts[:i])
        yield head + "." * bool(head), ".".join(parts[i:])


def common_prefix(names: Iterable[str], key: Callable[[str], str], wanted: set[str]) -> str:
    """The prefix without which most of `names`, by their key, are wanted; '' if none helps. Of equals the shortest.

    common_prefix(["module.a.w", "module.b.w", "v_head.w"], str, {"a.w", "b.w"}) -> "module."
    """
    counts = Counter()
    for name in list(names)[:SAMPLE]:
        counts.update(prefix for prefix, rest in parts_from_the_right(name) if key(rest) in wanted)
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def foreign_parts(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """Dotted parts, no numbers, of at least two of `names` that none of `others` has: what wraps modules on the way.

    foreign_parts(["a.0._wrapped.w", "a.1._wrapped.w"], ["a.0.w", "a.1.w"]) -> {"_wrapped"}
    """
    theirs = {part for name in others for part in name.split(".")}
    counts = Counter(part for name in names for part in name.split(".")[:-1])
    return {part for part, count in counts.items() if count > 1 and part not in theirs and not part.isdigit()}


def unwrapped(names: Iterable[str], key: Callable[[str], str], wanted: set[str]) -> tuple[dict[str, str], str]:
    """({name: its key without what wraps it}, what was taken off: 'module.', '_wrapped' or '').

    A prefix, or else parts on the way, whichever brings more names to `wanted`; none where names agree without.
    """
    names = list(names)
    plain = {name: key(name) for name in names}
    prefix = common_prefix(names, key, wanted)
    stripped = {name: key(name.removeprefix(prefix)) for name in names}
    foreign = foreign_parts(names, wanted)
    cleaned = {name: key(".".join(p for p in name.split(".") if p not in foreign)) for name in names}
    tries = ((plain, ""), (stripped, prefix), (cleaned, ", ".join(sorted(foreign))))
    return max(tries, key=lambda t: len(wanted & set(t[0].values())))  # of equals the first, which changes least


# --- what is left over ----------------------------------------------------------------------------


def _shortest(name: str, kept: set[str]) -> str:
    """The pattern of the largest part of the tree around `name` that holds no tensor in `kept` (heads of them)."""
    for head, rest in parts_from_the_right(name):
        if head and rest and head not in kept:
            return escape(head) + "*"
    return escape(name)


def patterns(names: Iterable[str], others: Iterable[str]) -> dict[str, int]:
    """{pattern (fnmatch): how many of `names` it stands for}; none matches one of `others`. Layers are folded.

    patterns(["v_head.w", "v_head.b", "layers.0.q.b", "layers.1.q.b"], ["layers.0.q.w", "layers.1.q.w"])
    -> {"v_head.*": 2, "layers.*.q.b": 2}
    """
    others = set(others)
    kept = {head for name in others for head, _ in parts_from_the_right(name)}
    names = list(names)
    count = Counter(_shortest(name, kept) for name in names)
    exact = Counter(p if count[p := _shortest(name, kept)] > 1 else escape(name) for name in names)
    folded: dict[str, Counter] = {}
    for pattern, times in exact.items():
        folded.setdefault(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", pattern), Counter())[pattern] = times
    found = {}
    for fold, members in folded.items():
        clash = len(members) > 1 and any(fnmatchcase(name, fold) for name in others)
        found |= dict(members) if clash or len(members) == 1 else {fold: members.total()}
    return found


def left_over(names: list[str], others: Iterable[str]) -> tuple[str, list[str]]:
    """('v_head.* (2 tensors), layers.*.q.b (2 tensors)', the patterns): what an error says of left-over names."""
    found = patterns(names, others)
    # A name may hold anything, line ends and colours for the terminal too: a stranger wrote it.
    said = {p: p if p.isprintable() else ascii(p) for p in found}
    shown = [f"{said[p]} ({n} tensor{'s' * (n > 1)})" for p, n in list(found.items())[:SHOWN]]
    more = sum(list(found.values())[SHOWN:])
    return ", ".join(shown) + (f" and {more} more" if more else ""), list(found)
