"""Results as a picture: each task's scores, and beside them the differences from one row."""

import math
from pathlib import Path

from common.pruners.pictures import save_figure
from merge_and_evaluate.rows import AVERAGE, Row, best_value, cell, columns, common_tasks, less_is_better, scale_of
from merge_and_evaluate.statistics import LEVEL, Difference, interval
from merge_and_evaluate.verdicts import Against

PANELS_ACROSS = 4


def draw(rows: list[Row], found: list[Against], reference: Row, path: Path) -> None:
    """One pair of panels per task, the average first: scores with one standard error, and the paired differences from
    `reference` with 95 % intervals (a forest plot). Without other rows (`found` empty) the scores alone."""
    from matplotlib.figure import Figure

    names = [AVERAGE, *columns(rows)]
    panels = [(name, kind) for name in names for kind in (("score", "difference") if found else ("score",))]
    across = min(PANELS_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(1.8 + 2.6 * across, 0.6 + down * (0.8 + 0.3 * len(rows))), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for (name, kind), axis in zip(panels, axes, strict=False):  # a last line of the grid may have places left over
        if kind == "score":
            _draw_scores(axis, rows, name)
        else:
            _draw_differences(axis, rows, _of_task(found, name), reference, name)
        _draw_frame(axis, rows)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(_legend(bool(found), reference), fontsize=8)
    save_figure(figure, path)


def _legend(with_differences: bool, reference: Row) -> str:
    scores = "score: percent for accuracies, bars one standard error, orange the best of a panel"
    differences = (
        f"difference: row minus {reference.name} on the same items, points, bars 95 % intervals; green better, red "
        "worse, grey cannot tell\n(average: corrected for the number of rows; one task: by its own p; hollow: not pair "
        "by pair)"
    )
    return f"{scores}\n{differences}" if with_differences else scores


def _of_task(found: list[Against], name: str) -> list[tuple[Row, Difference | None, float | None]]:
    """[(row, difference, the p that colours it)] of one panel."""
    if name == AVERAGE:
        return [(entry.row, entry.average, entry.p) for entry in found]
    differences = [(entry.row, entry.tasks.get(name)) for entry in found]
    return [(row, difference, difference.p if difference else None) for row, difference in differences]


def _draw_scores(axis, rows: list[Row], name: str) -> None:
    shared = common_tasks(rows)
    best = best_value(rows, name, shared)
    scale = scale_of(rows, name)
    for height, row in enumerate(rows):
        value, stderr = cell(row, name, shared)
        if value is None:
            continue
        colour = "tab:orange" if value == best and len(rows) > 1 else "tab:blue"
        axis.errorbar(value * scale, height, xerr=(stderr or 0) * scale, fmt="o", color=colour, capsize=3)
    axis.set_title(name, fontsize=10, fontweight="bold" if name == AVERAGE else "normal")


def _draw_differences(axis, rows: list[Row], entries: list, reference: Row, name: str) -> None:
    places = {id(row): height for height, row in enumerate(rows)}
    scale = scale_of(rows, name)
    less = less_is_better(rows, name, common_tasks(rows))
    axis.axvline(0, color="black", linewidth=1, zorder=0)
    axis.plot(0, places[id(reference)], marker="|", color="black", markersize=10)
    for row, difference, p in entries:
        if difference is None:
            continue
        reach = interval(difference)
        half = (reach[1] - difference.value) * scale if reach else 0
        colour = _colour(difference.value, p, less)
        filled = colour if difference.paired else "white"
        marker = {"fmt": "s", "color": colour, "markerfacecolor": filled, "markersize": 5, "capsize": 2}
        axis.errorbar(difference.value * scale, places[id(row)], xerr=half, **marker)
    axis.set_title(f"minus {reference.name}", fontsize=9, fontweight="bold" if name == AVERAGE else "normal")


def _colour(value: float, p: float | None, less: bool) -> str:
    """Green for better, red for worse, grey where p does not tell."""
    if p is None or p >= LEVEL:
        return "tab:gray"
    return "tab:green" if (value > 0) is not less else "tab:red"


def _draw_frame(axis, rows: list[Row]) -> None:
    axis.set_yticks(range(len(rows)), [row.label.replace("\\|", "|") for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=8)
