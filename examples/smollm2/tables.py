"""The example's scores: every row, its paired differences from task arithmetic and from the base, over one or more
seeds.

    python examples/smollm2/tables.py real/seed_0                  # one seed: differences ± their paired standard error
    python examples/smollm2/tables.py real/seed_0 real/seed_1      # several: mean ± standard error over seeds (paired
    error)

Everything is computed from the items in results_*.json and control_*.json: nothing is copied out of summaries. Accuracy
is in percent. log p is the mean log-probability of the right answer among the four, in hundredths of a nat: it says how
sure a model is where accuracy only counts which side of a threshold an answer falls, so it tells merges apart with
fewer items. The control is in hundredths of a bit per byte, less is better.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples import markdown
from merge_and_evaluate.choosing import log_golds
from merge_and_evaluate.items import Items, read_items, shared
from merge_and_evaluate.statistics import Difference, mean_difference, paired_difference

REFERENCES = {"task arithmetic": "TA", "base": "base"}
CONTROL = "smollm2_plain"
HUNDREDTHS = 100


@dataclass(frozen=True)
class Scored:
    """One row of one seed: the weight that was chosen (None: not a merge) and its items by task, the control's
    apart."""

    name: str
    weight: float | None
    items: dict[str, Items]
    control: Items | None

    @property
    def gold(self) -> dict[str, Items]:
        """The same questions with the log-probability of the right answer, in nats, for a score."""
        return {
            task: Items(found.names, log_golds(found.gold, self.name, task), found.gold)
            for task, found in self.items.items()
        }


# --- out of results files -------------------------------------------------------------------------


def read_seed(directory: Path) -> dict[str, Scored]:
    """{name: row} of one seed, in the order in which they were scored."""
    documents = [
        (path, json.loads(path.read_text()))
        for path in directory.glob("results_*.json")
        if not path.stem.endswith("_race") and "_weight_" not in path.stem
    ]
    if not documents:
        raise SystemExit(f"error: {directory}: no results_*.json in it; run the example first (make real)")
    documents.sort(key=lambda found: found[1]["date"])
    rows = [_row(path, document) for path, document in documents]
    return {row.name: row for row in rows}


def _row(path: Path, document: dict) -> Scored:
    other = path.with_name(path.name.replace("results_", "control_", 1))
    control = read_items(str(other), json.loads(other.read_text()))[CONTROL] if other.is_file() else None
    weights = document["summary"].get("weights")
    items = read_items(str(path), document)
    return Scored(document["summary"]["name"], weights[0] if weights else None, items, control)


# --- figures --------------------------------------------------------------------------------------


def mean_of(items: Items) -> float:
    return math.fsum(items.values) / len(items.values)


def levels(items: dict[str, Items]) -> list[float]:
    """The mean of each task, then the mean of these."""
    means = [mean_of(found) for found in items.values()]
    return [*means, math.fsum(means) / len(means)]


def difference(reference: dict[str, Items], row: dict[str, Items]) -> Difference:
    """row − reference on the questions that both answered: the mean over tasks of the paired differences."""
    return mean_difference([paired_difference(*shared(reference[task], row[task])) for task in row])


def over_seeds(found: list[Difference], scale: float = HUNDREDTHS) -> str:
    """One: '+3.33 ± 1.80', its paired error. Several: '+3.33 ± 0.90 (1.80)', the mean, the standard error over seeds,
    and the paired error within a seed (root mean square)."""
    if any(one.stderr is None for one in found):
        return "–"
    values = [scale * one.value for one in found]
    within = scale * math.sqrt(math.fsum(one.stderr**2 for one in found) / len(found))
    mean = math.fsum(values) / len(values)
    if len(found) == 1:
        return f"{mean:+.2f} ± {within:.2f}"
    return f"{mean:+.2f} ± {markdown.stderr_of_mean(values):.2f} ({within:.2f})"


# --- tables ---------------------------------------------------------------------------------------


def score_table(seeds: list[dict[str, Scored]], names: list[str], measure: str) -> str:
    """A line for each row: λ, each topic, their mean, and the mean's differences from the references."""
    tasks = [task.split("_")[1] for task in next(iter(seeds[0].values())).items]
    rows = []
    for name in names:
        found = [getattr(seed[name], measure) for seed in seeds]
        weights = ", ".join(f"{seed[name].weight:g}" for seed in seeds if seed[name].weight is not None)
        columns = zip(*[levels(items) for items in found], strict=True)
        apart = [
            "" if name == reference else over_seeds(_against(seeds, reference, name, measure))
            for reference in REFERENCES
        ]
        means = [markdown.mean_and_stderr([HUNDREDTHS * value for value in column]) for column in columns]
        rows.append([name, weights, *means, *apart])
    return markdown.table(["", "λ", *tasks, "mean", *(f"minus {short}" for short in REFERENCES.values())], rows)


def _against(seeds: list[dict[str, Scored]], reference: str, name: str, measure: str) -> list[Difference]:
    return [difference(getattr(seed[reference], measure), getattr(seed[name], measure)) for seed in seeds]


def control_table(seeds: list[dict[str, Scored]], names: list[str]) -> str:
    """A line for each row: bits per byte on plain text, and its difference from the base."""
    rows = []
    for name in [name for name in names if all(seed[name].control for seed in seeds)]:
        controls = [seed[name].control for seed in seeds]
        apart = [paired_difference(*shared(seed["base"].control, seed[name].control)) for seed in seeds]
        level = markdown.mean_and_stderr([HUNDREDTHS * mean_of(control) for control in controls])
        rows.append([name, level, "" if name == "base" else over_seeds(apart)])
    return markdown.table(["", "bits per byte × 100", "minus base"], rows)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="results of one seed each")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    seeds = [read_seed(directory) for directory in parse_args(argv).directories]
    missing = [name for name in REFERENCES if not all(name in seed for seed in seeds)]
    if missing:
        raise SystemExit(
            f"error: a seed has no row {missing[0]!r}, which the others are compared with; run PARTS=main first"
        )
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    counts = ", ".join(f"{len(items.values)} {task}" for task, items in seeds[0]["base"].items.items())
    print(f"Questions: {counts}. Seeds: {len(seeds)}.\n\nAccuracy, percent\n")
    print(score_table(seeds, names, "items"))
    print("\nlog p of the right answer, hundredths of a nat\n")
    print(score_table(seeds, names, "gold"))
    print("\nControl: plain text that no fine-tuning saw\n")
    print(control_table(seeds, names))
    print(
        "\n± of a difference: its paired standard error, over the questions."
        if len(seeds) == 1
        else "\n±: standard error over seeds; in brackets the paired standard error within a seed."
    )


if __name__ == "__main__":
    main()
