"""The demo's rows over one or more seeds: each row's mean score ± standard error of that mean, its λ, what choosing it
took.

    python examples/tiny_mistral/seeds.py demo                                  # one run of the demo
    python examples/tiny_mistral/seeds.py demo_seeds/seed_0 demo_seeds/seed_1   # several: see seeds.sh

The standard error is over seeds (models trained anew), not over questions: it says how far another seed would differ.
With one seed it is not known, and left out.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples import markdown

ROWS = ("results_base-float16", "results_countries", "results_elements", "results_task_arithmetic")
ROWS += ("results_magnitude", "results_dare", "results_ties", "results_ties_dare", "results")  # the last: CABS
REFERENCE = "task arithmetic"


@dataclass(frozen=True)
class Row:
    """One method with one seed: its scores by column in percent, its λ, the share of all items that choosing λ took."""

    name: str
    scores: dict[str, float]
    weight: float | None
    share: float | None


def read_rows(directory: Path) -> list[Row]:
    """The rows of one run of the demo, in the order of its table."""
    found = []
    for path in [place for row in ROWS if (place := directory / f"{row}.json").is_file()]:
        summary = json.loads(path.read_text())["summary"]
        scores = {name: 100 * task["value"] for name, task in summary["tasks"].items()}
        chosen = summary.get("chosen", {})
        share = chosen["items"] / chosen["items_of_all"] if "items_of_all" in chosen else None
        weight = summary["weights"][0] if "weights" in summary else None
        found.append(Row(summary["name"], scores | {"average": 100 * summary["average"]}, weight, share))
    if not found:
        raise SystemExit(f"error: {directory}: no results*.json in it; run the demo first (make demo)")
    return found


def table(runs: list[list[Row]]) -> str:
    """Markdown: a line for each row that every run has. Over several seeds also each row's difference from task
    arithmetic, seed by seed: the rows of a seed are merges of the same models, so what a seed does to all of them is
    not in it."""
    names = [row.name for row in runs[0] if all(row.name in [other.name for other in run] for run in runs)]
    columns = list(runs[0][0].scores)
    heads = ["", "λ", *columns, *([f"minus {REFERENCE}"] if len(runs) > 1 else []), "items to choose λ"]
    lines = []
    reference = [row.scores["average"] for run in runs for row in run if row.name == REFERENCE]
    for name in names:
        rows = [row for run in runs for row in run if row.name == name]
        weights = ", ".join(f"{row.weight:g}" for row in rows if row.weight is not None)
        shares = [100 * row.share for row in rows if row.share is not None]
        share = f"{math.fsum(shares) / len(shares):.0f} %" if shares else ""
        cells = [markdown.mean_and_stderr([row.scores[column] for row in rows]) for column in columns]
        if len(runs) > 1:
            gaps = [row.scores["average"] - other for row, other in zip(rows, reference, strict=True)]
            cells.append(markdown.mean_and_stderr(gaps) if name != REFERENCE else "")
        lines.append([name, weights, *cells, share])
    return markdown.table(heads, lines)


def saved(runs: list[list[Row]]) -> str:
    """What the races saved, in one line."""
    shares = [row.share for run in runs for row in run if row.share is not None]
    if not shares:
        return "no λ was chosen by a race"
    share = math.fsum(shares) / len(shares)
    return f"The races scored {share:.0%} of the items that scoring every λ on every question takes."


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="results of one run of the demo each")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    runs = [read_rows(directory) for directory in parse_args(argv).directories]
    print(table(runs))
    print(f"\n{saved(runs)}")
    if len(runs) > 1:
        print(f"Means over {len(runs)} seeds ± standard error over them; λ seed by seed.")


if __name__ == "__main__":
    main()
