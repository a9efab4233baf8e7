"""What is tried: choices of weights, of a recipe where several are given, and what each is called."""

import itertools
from dataclasses import dataclass

from common.shards.hashing import text_hash


def _text(weight: float) -> str:
    """A weight in as few digits as tell it from every other: 1.0 -> '1', 0.6000001 -> '0.6000001'.

    Names of directories, results files and rows are made of it: two weights of one name would be taken for one.
    """
    short = f"{weight:g}"
    return short if float(short) == weight else repr(float(weight))


def label(weights: tuple[float, ...]) -> str:
    """(0.6, 1.2) -> '0.6 / 1.2'."""
    return " / ".join(map(_text, weights))


@dataclass(frozen=True)
class Choice:
    """What tells one candidate from another. weights: () for those of the recipe as it stands; recipe: its name where
    several recipes are tried, else ''."""

    weights: tuple[float, ...] = ()
    recipe: str = ""

    @property
    def label(self) -> str:
        """Its name in tables: '0.6', 'cabs', 'cabs 0.6 / 1.2'."""
        return " ".join(part for part in (self.recipe, label(self.weights)) if part)

    @property
    def said(self) -> str:
        """Its name in a sentence: 'weight 0.6', 'recipe cabs', 'recipe cabs with weight 0.6'."""
        parts = (
            f"recipe {self.recipe}" if self.recipe else "",
            f"weight {label(self.weights)}" if self.weights else "",
        )
        return " with ".join(part for part in parts if part)

    @property
    def ending(self) -> str:
        """What its directory and results file end in: 'weight_0.6', 'weights_0.6_1.2', 'recipe_cabs_weight_0.6'."""
        weights = "_".join(map(_text, self.weights))
        if len(self.weights) > 16:  # a file's name has 255 bytes at most
            weights = text_hash(repr(self.weights))[:16]
        kind = "weight_" if len(self.weights) == 1 else "weights_"
        parts = (f"recipe_{self.recipe}" if self.recipe else "", kind + weights if self.weights else "")
        return "_".join(part for part in parts if part)

    @property
    def record(self) -> dict:
        """What a results file says of it: {"recipe": …} where several are tried, {"weights": …} where some are set."""
        return ({"recipe": self.recipe} if self.recipe else {}) | ({"weights": self.weights} if self.weights else {})


def weight_choices(weights: list[float] | None, grids: list[list[float]] | None) -> list[tuple[float, ...]]:
    """([0.6, 0.9], None) -> [(0.6,), (0.9,)]; (None, [[1, 2], [3]]) -> [(1, 3), (2, 3)]; each once; none: []."""
    grids = [weights] if weights else grids
    return list(dict.fromkeys(itertools.product(*grids))) if grids else []


def said_of(record: dict) -> str:
    """A results file's `chosen` in words: {"weights": [0.6]} -> 'weight 0.6'."""
    return Choice(tuple(record.get("weights", ())), record.get("recipe", "")).said
