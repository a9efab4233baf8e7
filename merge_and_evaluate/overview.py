"""A sweep at a glance: table, CSV, picture of score against weight."""

import csv
import io
from pathlib import Path

from common.pruners.pictures import save_figure
from common.shards.staging import write_file
from merge_and_evaluate.comparison import label, setting_remarks, table
from merge_and_evaluate.rows import Row, columns, row_of

Weights = tuple[float, ...]


def overview_csv(documents: dict[Weights, dict], chosen: Weights) -> str:
    """One line per choice of weights: every task's score and standard error, the average, whether chosen."""
    rows = {weights: Row("", document["summary"], {}) for weights, document in documents.items()}
    tasks = columns(list(rows.values()))
    weight_heads = ["weight"] if len(chosen) == 1 else [f"weight_{i}" for i, _ in enumerate(chosen, 1)]
    task_heads = [task + ending for task in tasks for ending in ("", "_stderr")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*weight_heads, *task_heads, "average", "average_stderr", "chosen"])
    for weights, row in rows.items():
        scores = [row.tasks[task][key] for task in tasks for key in ("value", "stderr")]
        averages = [row.summary["average"], row.summary["average_stderr"]]
        writer.writerow([*weights, *scores, *averages, int(weights == chosen)])
    return out.getvalue()


def draw_overview(documents: dict[Weights, dict], chosen: Weights, path: Path) -> None:
    """Score against weight: a line per task, the average in black with its standard error, the choice marked.

    With a weight per model the choices are drawn side by side, in order.
    """
    from matplotlib.figure import Figure

    choices = sorted(documents)
    places = [weights[0] for weights in choices] if len(chosen) == 1 else list(range(len(choices)))
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    _draw_lines(axis, places, [documents[weights]["summary"] for weights in choices])
    marked = places[choices.index(chosen)]
    axis.axvline(marked, color="grey", linestyle=":", label=f"chosen: {label(chosen)}", zorder=0)
    if len(chosen) == 1:
        axis.set_xlabel("weight of each task vector (λ)")
    else:
        axis.set_xticks(places, [label(weights) for weights in choices], rotation=45, ha="right")
        axis.set_xlabel("weights of the task vectors (λ), in the recipe's order")
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def _draw_lines(axis, places: list, summaries: list[dict]) -> None:
    scale = 100 if all(0 <= task["value"] <= 1 for summary in summaries for task in summary["tasks"].values()) else 1
    for task in summaries[0]["tasks"]:
        values = [scale * summary["tasks"][task]["value"] for summary in summaries]
        axis.plot(places, values, marker="o", markersize=3, linewidth=1, label=task)
    averages = [scale * summary["average"] for summary in summaries]
    errors = [scale * (summary["average_stderr"] or 0) for summary in summaries]
    axis.errorbar(
        places,
        averages,
        yerr=errors,
        color="black",
        marker="o",
        markersize=5,
        linewidth=2.5,
        elinewidth=1,
        capsize=3,
        label="average ± standard error",
    )
    axis.set_ylabel("score, percent" if scale == 100 else "score")
    axis.grid(alpha=0.3)


def write_overview(documents: dict[Weights, dict], chosen: Weights, output_path: Path) -> None:
    """Print the table of all choices; write it as CSV and draw it, beside the results file."""
    stem = output_path.with_suffix("")
    listing, picture = stem.with_name(stem.name + "_sweep.csv"), stem.with_name(stem.name + "_sweep.png")
    write_file(listing, overview_csv(documents, chosen).encode())
    draw_overview(documents, chosen, picture)
    rows = [row_of(document, name=label(weights)) for weights, document in documents.items()]
    print(table(rows, "weight"))
    for note in setting_remarks(rows):
        print(f"- {note}")
    print(f"wrote {listing}\nwrote {picture}")
