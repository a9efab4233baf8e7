"""A sweep at a glance: table, CSV, picture of score against weight."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common.pruners.pictures import save_figure
from common.shards.staging import write_file
from merge_and_evaluate.choices import Choice
from merge_and_evaluate.comparison import setting_remarks, table
from merge_and_evaluate.results import limit_of
from merge_and_evaluate.rows import Row, columns, row_of

DIFFERENT_ITEMS = (
    "what dropped out early was scored on few items, so these scores do not compare; how far each was behind on the "
    "same items is said above"
)


# The mean log-probability of the right answer and its standard error, in nats.
Golds = Mapping[Choice, tuple[float, float | None]]
LOG_P = "log p of the right answer, nats (chooses)"


def overview_csv(documents: Mapping[Choice, dict], chosen: Choice, golds: Golds) -> str:
    """One line per choice: recipe where several are tried, weights where some are set, every task's score and standard
    error, the average, the log-probability of the right answer where it chose, whether chosen, how many items it was
    scored on (in a race they differ), the limit if there was one."""
    rows = {choice: Row("", document["summary"]) for choice, document in documents.items()}
    tasks = columns(list(rows.values()))
    heads = ["recipe"] * bool(chosen.recipe)
    heads += ["weight"] if len(chosen.weights) == 1 else [f"weight_{i}" for i, _ in enumerate(chosen.weights, 1)]
    heads += [task + ending for task in tasks for ending in ("", "_stderr")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    gold_heads = ["gold", "gold_stderr"] if golds else []
    writer.writerow([*heads, "average", "average_stderr", *gold_heads, "chosen", "items", "limit"])
    for choice, row in rows.items():
        own = [choice.recipe] * bool(choice.recipe) + list(choice.weights)
        scores = [row.tasks[task][key] for task in tasks for key in ("value", "stderr")]
        averages = [row.summary["average"], row.summary["average_stderr"], *golds.get(choice, ())]
        writer.writerow([*own, *scores, *averages, int(choice == chosen), _items(row), limit_of(documents[choice])])
    return out.getvalue()


def _items(row: Row) -> int | None:
    counts = [task.get("samples") for task in row.tasks.values()]
    return None if None in counts else sum(counts)


# --- picture --------------------------------------------------------------------------------------


def draw_overview(documents: Mapping[Choice, dict], chosen: Choice, path: Path, golds: Golds) -> None:
    """Score against weight: a line per task, the average in black with its standard error, the choice marked; of
    several recipes the averages alone, a line for each. Where there is no one weight, the choices stand side by side,
    in order. Above it the log-probability of the right answer, where it chose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.5 if golds else 5), layout="constrained")
    *above, axis = figure.subplots(1 + bool(golds), sharex=True, squeeze=False)[:, 0]
    tasks = [task for document in documents.values() for task in document["summary"]["tasks"].values()]
    # Percent only for shares: a perplexity or a count is none.
    scale = 100 if all(0 <= task["value"] <= 1 for task in tasks) else 1
    draw = _draw_recipes if len(chosen.weights) == 1 and chosen.recipe else _draw_tasks
    place = draw(axis, documents, chosen, scale)
    for gold_axis in above:
        _draw_golds(gold_axis, documents, chosen, golds)
        gold_axis.axvline(place, color="grey", linestyle=":", zorder=0)
    axis.axvline(place, color="grey", linestyle=":", label=f"chosen: {chosen.label}", zorder=0)
    axis.set_ylabel("score, percent" if scale == 100 else "score")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def _side_by_side(documents: Mapping[Choice, dict], chosen: Choice) -> tuple[list[Choice], list[float]]:
    """(choices, where each stands): by their one weight, else in order."""
    choices = sorted(documents, key=lambda choice: choice.weights) if not chosen.recipe else list(documents)
    return choices, [c.weights[0] for c in choices] if len(chosen.weights) == 1 else list(range(len(choices)))


def _draw_golds(axis, documents: Mapping[Choice, dict], chosen: Choice, golds: Golds) -> None:
    """What chose, with its standard error; a line for each recipe where they are drawn against one weight."""
    lines = [_side_by_side(documents, chosen)]
    if chosen.recipe and len(chosen.weights) == 1:
        names = list(dict.fromkeys(choice.recipe for choice in documents))
        lines = [
            _side_by_side({c: documents[c] for c in documents if c.recipe == name}, Choice((0.0,))) for name in names
        ]
    for choices, places in lines:
        values, errors = [golds[c][0] for c in choices], [golds[c][1] or 0 for c in choices]
        colour = {"color": "black"} if len(lines) == 1 else {}
        axis.errorbar(places, values, errors, marker="o", markersize=4, elinewidth=1, capsize=3, **colour)
    axis.set_ylabel(LOG_P.replace(", nats", ",\nnats"))
    axis.grid(alpha=0.3)


def _draw_tasks(axis, documents: Mapping[Choice, dict], chosen: Choice, scale: int) -> float:
    """Every task of every choice -> where the chosen one is."""
    choices, places = _side_by_side(documents, chosen)
    summaries = [documents[choice]["summary"] for choice in choices]
    for task in summaries[0]["tasks"]:
        values = [scale * summary["tasks"][task]["value"] for summary in summaries]
        axis.plot(places, values, marker="o", markersize=3, linewidth=1, label=task)
    style = {"color": "black", "marker": "o", "markersize": 5, "linewidth": 2.5, "elinewidth": 1, "capsize": 3}
    axis.errorbar(places, *_averages(summaries, scale), label="average ± standard error", **style)
    if len(chosen.weights) == 1:
        axis.set_xlabel("weight of each task vector (λ)")
    else:
        axis.set_xticks(places, [choice.label for choice in choices], rotation=45, ha="right")
        axis.set_xlabel("recipe" if chosen.recipe else "weights of the task vectors (λ), in the recipe's order")
    return places[choices.index(chosen)]


def _draw_recipes(axis, documents: Mapping[Choice, dict], chosen: Choice, scale: int) -> float:
    """Each recipe's average against its weight -> where the chosen one is."""
    for recipe in dict.fromkeys(choice.recipe for choice in documents):
        choices = sorted((c for c in documents if c.recipe == recipe), key=lambda choice: choice.weights)
        averages, errors = _averages([documents[choice]["summary"] for choice in choices], scale)
        style = {"marker": "o", "markersize": 4, "elinewidth": 1, "capsize": 3}
        style["linewidth"] = 2.5 if recipe == chosen.recipe else 1.2
        axis.errorbar([choice.weights[0] for choice in choices], averages, errors, label=recipe, **style)
    axis.set_xlabel("weight of each task vector (λ)")
    return chosen.weights[0]


def _averages(summaries: list[dict], scale: int) -> tuple[list[float], list[float]]:
    """(averages, standard errors), as they are drawn; tasks that point both ways have none, and nothing is drawn."""
    averages = [math.nan if s["average"] is None else scale * s["average"] for s in summaries]
    return averages, [scale * (s["average_stderr"] or 0) for s in summaries]


def _log_p(mean: float, stderr: float | None, is_chosen: bool) -> str:
    text = f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"
    return f"**{text}**" if is_chosen else text


def write_overview(documents: Mapping[Choice, dict], chosen: Choice, output_path: Path, golds: Golds) -> None:
    """Print the table of all choices; write it as CSV and draw it, beside the results file. golds: where they chose."""
    stem = output_path.with_suffix("")
    listing, picture = stem.with_name(stem.name + "_sweep.csv"), stem.with_name(stem.name + "_sweep.png")
    write_file(listing, overview_csv(documents, chosen, golds).encode())
    draw_overview(documents, chosen, picture, golds)
    rows = [row_of(document, name=choice.label) for choice, document in documents.items()]
    notes = setting_remarks(rows)
    counts = [_items(row) for row in rows]
    same_items = len(set(counts)) == 1 or None in counts
    if not same_items:
        rows = [replace(row, name=f"{row.name} ({count:,} items)") for row, count in zip(rows, counts, strict=True)]
        notes = [DIFFERENT_ITEMS, *(note for note in notes if ": numbers of items differ: " not in note)]
    beside = (LOG_P, [_log_p(*golds[choice], choice == chosen) for choice in documents]) if golds else None
    print(table(rows, "candidate" if chosen.recipe else "weight", beside, same_items))
    for note in notes:
        print(f"- {note}")
    print(f"wrote {listing}\nwrote {picture}")
