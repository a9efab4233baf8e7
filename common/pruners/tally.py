"""What is counted while a tensor is pruned, for every vector.

A figure of the report begins here as a field of Tally, is filled by both engines' tally(), and is shown by
report.measures(): a new one touches these four places.
"""

from dataclasses import asdict, dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Tally:
    """Counts of one vector's tensor, or of several, added up. "Kept" means kept with a value other than zero.

    The evenness over groups of m needs whole groups: `tail` is what is kept outside them.
    """

    numel: int = 0
    nonzero: int = 0  # elements of the vector that are not zero: where fine-tuned and base differ
    kept: int = 0
    energy: float = 0.0  # sum of squares of everything, good to about 6 digits
    energy_kept: float = 0.0
    groups: int = 0  # whole groups of m
    squares: int = 0  # over whole groups: sum of (kept in the group) squared
    tail: int = 0  # kept in the group that is still open: at the end of a tensor in its last, shorter one
    both: tuple[int, ...] = ()  # per vector: kept by this one and that one; 0 for itself
    either: tuple[int, ...] = ()

    def __add__(self, other: "Tally") -> "Tally":
        """Counts of both; a Tally without vectors is none's.

        Tally(numel=4, kept=1, both=(0, 1)) + Tally(numel=2) -> Tally(numel=6, kept=1, both=(0, 1))
        """
        return Tally(**{f.name: _added(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    @property
    def kept_in_groups(self) -> int:
        """What whole groups of m hold of `kept`."""
        return self.kept - self.tail


def _added(one, other):
    if not isinstance(one, tuple):
        return one + other
    return tuple(a + b for a, b in zip(one, other, strict=True)) if one and other else one or other


_OF_ALL = ("numel", "either")  # known without counting, or from `both`
_COUNTED = [field for field in fields(Tally) if field.name not in (*_OF_ALL, "both")]


def new_counts(vectors: int) -> np.ndarray:
    """Room for the counts of one tensor, all zero: a structured array [vectors] with the fields of Tally by name.

    What an engine's tally() adds to, block by block: int64, float64 for energies, `both` int64 [vectors].
    """
    scalars = [(field.name, np.dtype(field.type)) for field in _COUNTED]
    return np.zeros(vectors, [*scalars, ("both", np.int64, (vectors,))])


def tallies(counts: np.ndarray, numel: int) -> list[Tally]:
    """What was counted of a tensor of so many elements, vector by vector."""
    both = counts["both"] + counts["both"].T  # the kernels count each pair once
    either = np.add.outer(counts["kept"], counts["kept"]) - both
    np.fill_diagonal(either, 0)
    return [
        Tally(
            numel,
            **{field.name: row[field.name].item() for field in _COUNTED},
            both=tuple(both[j].tolist()),
            either=tuple(either[j].tolist()),
        )
        for j, row in enumerate(counts)
    ]


def to_record(tally: Tally) -> dict:
    """The tally as a job's records hold it, in JSON."""
    return asdict(tally)


def from_record(record: dict) -> Tally:
    """The Tally of such a record: from_record(to_record(tally)) == tally, also by way of JSON."""
    return Tally(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})
