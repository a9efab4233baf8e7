"""Results side by side: one table, one picture."""

import math
from dataclasses import dataclass
from pathlib import Path

from common.pruners.pictures import save_figure
from merge_and_evaluate.results import percent, read_results
from merge_and_evaluate.scores import mean_stderr

AVERAGE = "average"


@dataclass(frozen=True)
class Row:
    """One method: its name and its summary from a results file."""

    name: str
    summary: dict
    origin: dict

    @property
    def tasks(self) -> dict[str, dict]:
        return self.summary["tasks"]


def label(weights: tuple[float, ...]) -> str:
    """(0.6, 1.2) -> '0.6 / 1.2'."""
    return " / ".join(f"{weight:g}" for weight in weights)


def read_rows(paths: list[str]) -> list[Row]:
    documents = [read_results(path) for path in paths]
    return [Row(d["summary"]["name"], d["summary"], d.get("provenance", {})) for d in documents]


# --- columns --------------------------------------------------------------------------------------


def columns(rows: list[Row]) -> list[str]:
    """Every task of any row, in the order of first appearance."""
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def common_tasks(rows: list[Row]) -> list[str]:
    return [task for task in columns(rows) if all(task in row.tasks for row in rows)]


def cell(row: Row, column: str, shared: list[str]) -> tuple[float | None, float | None]:
    """(score, standard error). The average is over the tasks that all rows have, so that it compares."""
    if column != AVERAGE:
        task = row.tasks.get(column, {})
        return task.get("value"), task.get("stderr")
    if set(shared) == set(row.tasks):
        return row.summary["average"], row.summary["average_stderr"]
    values = [row.tasks[task]["value"] for task in shared]
    if not values or None in values:
        return None, None
    return math.fsum(values) / len(values), mean_stderr([row.tasks[task]["stderr"] for task in shared])


def best_value(rows: list[Row], column: str, shared: list[str]) -> float | None:
    """The best score of a column: the largest, or the smallest where the task says that less is better."""
    values = [value for row in rows if (value := cell(row, column, shared)[0]) is not None]
    looked_at = shared if column == AVERAGE else [column]
    less = any(
        row.tasks[task].get("higher_is_better") is False for row in rows for task in looked_at if task in row.tasks
    )
    return (min if less else max)(values, default=None)


# --- table ----------------------------------------------------------------------------------------


def table(rows: list[Row], corner: str = "method") -> str:
    """Markdown: rows × tasks and the average, in percent with standard errors, the best of a column in bold."""
    shared = common_tasks(rows)
    names = [*columns(rows), AVERAGE]
    best = {name: best_value(rows, name, shared) for name in names}
    heads = list(names)
    if any(set(row.tasks) != set(shared) for row in rows):
        heads[-1] = f"average of {', '.join(shared)}" if shared else "average (no task in common)"
    lines = ["| " + " | ".join([corner, *heads]) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = []
        for name in names:
            value, stderr = cell(row, name, shared)
            bold = value is not None and value == best[name] and len(rows) > 1
            cells.append(f"**{percent(value, stderr)}**" if bold else percent(value, stderr))
        lines.append("| " + " | ".join([row.name.replace("|", "\\|"), *cells]) + " |")
    return "\n".join(lines)


def _differences(rows: list[Row], what: str, of) -> list[str]:
    """One remark if `of(row)` is known for all rows and not the same."""
    found = [of(row) for row in rows]
    if None in found or len({str(value) for value in found}) == 1:
        return []
    return [f"{what} differ: " + ", ".join(f"{row.name} {value}" for row, value in zip(rows, found, strict=True))]


def remarks(rows: list[Row]) -> list[str]:
    """What a reader must know before comparing these rows."""
    notes = []
    for task in common_tasks(rows):
        for what in ("num_fewshot", "metric", "samples"):
            notes += _differences(rows, f"{task}: {what}", lambda row, t=task, w=what: row.tasks[t].get(w))
    notes += _differences(rows, "batch sizes", lambda row: row.origin.get("batch_size"))
    notes += _differences(rows, "lm_eval versions", lambda row: row.origin.get("versions", {}).get("lm_eval"))
    for row in rows:
        chosen = row.summary.get("chosen")
        if chosen and chosen["held_out"]:
            notes.append(f"{row.name}: weight {label(chosen['weights'])} chosen on {', '.join(chosen['on'])}")
        elif chosen and len(chosen["candidates"]) > 1:
            notes.append(
                f"{row.name}: weight {label(chosen['weights'])} chosen on the very tasks it is reported on, "
                "which flatters it"
            )
    return notes


# --- picture --------------------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    """One panel per task and one for the average: a dot with its standard error for every row."""
    from matplotlib.figure import Figure

    shared = common_tasks(rows)
    names = [AVERAGE, *columns(rows)]
    across = min(4, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(1.6 + 2.6 * across, down * (0.9 + 0.32 * len(rows))), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for name, axis in zip(names, axes, strict=False):
        _draw_panel(axis, rows, name, shared)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("score (percent for accuracies), bars: one standard error, red: the best of a panel", fontsize=9)
    save_figure(figure, path)


def _draw_panel(axis, rows: list[Row], name: str, shared: list[str]) -> None:
    best = best_value(rows, name, shared)
    for height, row in enumerate(rows):
        value, stderr = cell(row, name, shared)
        if value is None:
            continue
        scale = 100 if 0 <= value <= 1 else 1
        colour = "tab:red" if value == best else "tab:blue"
        axis.errorbar(value * scale, height, xerr=(stderr or 0) * scale, fmt="o", color=colour, capsize=3)
    axis.set_title(name, fontsize=10, fontweight="bold" if name == AVERAGE else "normal")
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=8)


def compare(paths: list[str], plot_path: Path) -> None:
    """Print the table of these results files and what to mind about it; draw the picture."""
    rows = read_rows(paths)
    print(table(rows))
    for note in remarks(rows):
        print(f"- {note}")
    draw(rows, plot_path)
    print(f"wrote {plot_path}")
