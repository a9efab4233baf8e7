"""Is this row better than that one? Paired differences from one row, and what they prove, in words."""

import os
from dataclasses import dataclass

from common.errors import DataError
from common.shards.places import whole_path
from merge_and_evaluate import statistics
from merge_and_evaluate.items import is_plain_mean
from merge_and_evaluate.items import shared as shared_items
from merge_and_evaluate.rows import AVERAGE, Row, columns, common_tasks, less_is_better, scale_of
from merge_and_evaluate.statistics import LEVEL, Difference


@dataclass(frozen=True)
class Against:
    """A row's differences from the reference row: by task, over all tasks that every row has, its p-value corrected
    for how many rows are asked about, and the verdict in words."""

    row: Row
    tasks: dict[str, Difference]
    average: Difference | None
    p: float | None
    verdict: str


def reference_row(rows: list[Row], against: str | None) -> Row:
    """The row named by --against (its name, or its file); the first if none is. DataError if there is no such row."""
    if against is None:
        return rows[0]
    by_file = [row for row in rows if row.path and whole_path(row.path) == whole_path(os.path.expanduser(against))]
    by_name = [row for row in rows if row.name == against]
    if not by_file and len(by_name) > 1:
        raise DataError(f"--against {against!r}: {len(by_name)} rows have that name; give the file instead")
    if not by_file and not by_name:
        names = ", ".join(row.name for row in rows)
        raise DataError(f"--against {against!r}: no such row; the rows are {names}")
    return (by_file or by_name)[0]


# --- one row, one task ----------------------------------------------------------------------------


def task_difference(reference: Row, row: Row, task: str) -> Difference | None:
    """row − reference in one task: pair by pair where both have the same items, else from the two standard errors.
    None where they have no score in the same metric."""
    first, second = reference.tasks.get(task, {}), row.tasks.get(task, {})
    if None in (first.get("value"), second.get("value")) or first.get("metric") != second.get("metric"):
        return None
    pairs = _pairs(reference, row, task)
    if pairs is None:
        items = min(first.get("samples") or 0, second.get("samples") or 0)
        scores = [(found["value"], found.get("stderr")) for found in (first, second)]
        return statistics.unpaired_difference(*scores, items)
    if is_plain_mean(task, [row.items[leaf].values for leaf in row.leaves[task]], row.tasks[task]["value"]):
        return statistics.mean_difference([statistics.paired_difference(a, b) for a, b in pairs])
    a, b = ([value for pair in pairs for value in pair[side]] for side in (0, 1))
    return statistics.paired_difference(a, b)


def _pairs(reference: Row, row: Row, task: str) -> list[tuple[list, list]] | None:
    """[(reference's scores, row's scores)] for each leaf on the items that both have; None if a leaf has none."""
    pairs = []
    for leaf in row.leaves.get(task, []):
        if leaf not in reference.items or leaf not in row.items:
            return None
        pairs.append(shared_items(reference.items[leaf], row.items[leaf]))
    return pairs if pairs and all(a for a, _ in pairs) else None


# --- all rows -------------------------------------------------------------------------------------


def check_directions(rows: list[Row]) -> None:
    """DataError where rows say of one task both that more and that less is better."""
    for task in columns(rows):
        there = [row for row in rows if task in row.tasks]
        ways = {row.tasks[task].get("higher_is_better") is not False for row in there}
        if len(ways) > 1:
            less = next(row for row in there if row.tasks[task].get("higher_is_better") is False)
            raise DataError(
                f"{task}: less is better in {less.name} ({less.tasks[task]['metric']}), more in another row; these do "
                "not compare; score both by the same recipe"
            )


def differences(rows: list[Row], against: str | None = None) -> list[Against]:
    """Each row but the reference against it. The average is over the tasks that all rows have, each counting once."""
    check_directions(rows)
    reference = reference_row(rows, against)
    others = [row for row in rows if row is not reference]
    by_task = [_by_task(reference, row) for row in others]
    averages = [_average(rows, found) for found in by_task]
    ps = statistics.holm([average.p if average else None for average in averages])
    parts = zip(others, by_task, averages, ps, strict=True)
    return [Against(row, found, average, p, _verdict(rows, reference, average, p)) for row, found, average, p in parts]


def _by_task(reference: Row, row: Row) -> dict[str, Difference]:
    found = {task: task_difference(reference, row, task) for task in columns([reference, row])}
    return {task: difference for task, difference in found.items() if difference is not None}


def _average(rows: list[Row], found: dict[str, Difference]) -> Difference | None:
    """The mean over the tasks that all rows have; None if one has no difference, or they point both ways."""
    tasks = common_tasks(rows)
    ways = {less_is_better(rows, task, tasks) for task in tasks}
    if not tasks or len(ways) > 1 or any(task not in found for task in tasks):
        return None
    return statistics.mean_difference([found[task] for task in tasks])


def _verdict(rows: list[Row], reference: Row, average: Difference | None, p: float | None) -> str:
    """What a person with a decision to make wants to read."""
    if not common_tasks(rows):
        return "cannot tell: no task that all rows have"
    if average is None:
        return "cannot tell: not every task that all rows have is in one metric and direction"
    if p is None:
        return "cannot tell: the standard error is not known"
    unpaired = "" if average.paired else " (unpaired)"
    if p < LEVEL:
        better = (average.value > 0) is not less_is_better(rows, AVERAGE, common_tasks(rows))
        return f"{'better' if better else 'worse'} than {reference.name}{unpaired}"
    return f"cannot tell{unpaired}: {_what_it_would_take(average)}"


def _what_it_would_take(difference: Difference) -> str:
    needed = statistics.items_needed(difference)
    now = f"{difference.items:,} items"
    if abs(difference.value) < statistics.NO_DIFFERENCE:
        return f"no difference on {now}"
    if needed is not None and needed > difference.items:
        there = f"there are {difference.items:,} here"
        return f"a difference this size takes about {two_digits(needed):,} items to show, {there}"
    if needed is not None and difference.p < LEVEL:
        return f"enough items for these two alone, but chance does as much among so many rows ({now})"
    # items_needed counts on the normal distribution: of a few items it says "enough" where the exact test does not.
    return f"{now} are too few"


def two_digits(number: int) -> int:
    """Rounded up to two significant digits: 12345 -> 13000; 87 -> 87."""
    step = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // step) * step


# --- table ----------------------------------------------------------------------------------------


def points(difference: Difference | None, scale: int) -> str:
    """0.004 ± 0.0055 at scale 100 -> '+0.40 ± 0.55'; '–' for none; no standard error, none shown."""
    if difference is None:
        return "–"
    text = f"{difference.value * scale:+.2f}".replace("-0.00", "+0.00").replace("-", "−")
    text += f" ± {difference.stderr * scale:.2f}" if difference.stderr is not None else ""
    return text if difference.paired else f"{text} (unpaired)"


def p_text(p: float | None) -> str:
    """0.0301 -> '0.030'; 0.00001 -> '<0.001'."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def verdict_table(rows: list[Row], found: list[Against], reference: Row) -> str:
    """Markdown: for each row and task the difference ± standard error and p, the average, Holm's p, the verdict."""
    tasks = columns(rows)
    heads = [f"minus {reference.label}", *(f"{task} (p)" for task in tasks), AVERAGE, "p (Holm)", "verdict"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for entry in found:
        cells = [entry.row.label]
        for task in tasks:
            difference = entry.tasks.get(task)
            p = f" ({p_text(difference.p)})" if difference else ""
            cells.append(points(difference, scale_of(rows, task)) + p)
        cells += [points(entry.average, scale_of(rows, AVERAGE)), p_text(entry.p), entry.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairing_remarks(found: list[Against], reference: Row) -> list[str]:
    """Which differences are not pair by pair, and why; which are on a part of the items."""
    notes = []
    for entry in found:
        row, why = entry.row, {}
        for task, difference in entry.tasks.items():
            if not difference.paired:
                why.setdefault(_why_unpaired(reference, row, task), []).append(task)
            elif difference.items < max(side.tasks[task].get("samples") or 0 for side in (reference, row)):
                why.setdefault(f"paired on the {difference.items:,} items that both have", []).append(task)
        notes += [f"{row.name}: {', '.join(tasks)}: {reason}" for reason, tasks in why.items()]
    return notes


def _why_unpaired(reference: Row, row: Row, task: str) -> str:
    for side in (reference, row):
        if any(leaf not in side.items for leaf in side.leaves.get(task, [task])):
            return f"unpaired, {side.path or side.name} has no items (score it again for a paired figure)"
    return f"unpaired, no item in common with {reference.name}"
