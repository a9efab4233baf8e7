"""Results side by side: scores, paired differences with a verdict, what to mind, one picture."""

from pathlib import Path

from merge_and_evaluate.choices import said_of
from merge_and_evaluate.results import percent
from merge_and_evaluate.rows import AVERAGE, Row, best_value, cell, columns, common_tasks, head, read_rows, scale_of
from merge_and_evaluate.scores_picture import draw
from merge_and_evaluate.verdicts import differences, pairing_remarks, reference_row, verdict_table

# --- table ----------------------------------------------------------------------------------------


def table(
    rows: list[Row], corner: str = "method", beside: tuple[str, list[str]] | None = None, same_items: bool = True
) -> str:
    """Markdown: rows × tasks and the average, in percent with standard errors, the best of a column in bold. beside:
    one more column, its head and a cell a row. same_items: whether scores compare, so that one can be the best."""
    shared = common_tasks(rows)
    names = [*columns(rows), AVERAGE]
    best = {name: best_value(rows, name, shared) if same_items else None for name in names}
    heads = [*(head(rows, task) for task in columns(rows)), AVERAGE]
    if any(set(row.tasks) != set(shared) for row in rows):
        heads[-1] = f"average of {', '.join(shared)}" if shared else "average (no task in common)"
    heads = [corner, *heads] + ([beside[0]] if beside else [])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for number, row in enumerate(rows):
        cells = []
        for name in names:
            value, stderr = cell(row, name, shared)
            bold = value is not None and value == best[name] and len(rows) > 1  # a row alone is always the best
            shown = percent(value, stderr, scale_of(rows, name))
            cells.append(f"**{shown}**" if bold else shown)
        cells += [beside[1][number]] if beside else []
        lines.append("| " + " | ".join([row.label, *cells]) + " |")
    return "\n".join(lines)


TOLD_APART = {"num_fewshot": "shots", "metric": "metrics", "samples": "numbers of items"}  # of a task's summary

# --- remarks --------------------------------------------------------------------------------------


def _differences(rows: list[Row], what: str, of) -> list[str]:
    """One remark if of(row) is not the same for all rows that know it; '?' for those that do not."""
    found = [of(row) for row in rows]
    if len({str(value) for value in found if value is not None}) < 2:
        return []
    shown = ["?" if value is None else value for value in found]
    return [f"{what} differ: " + ", ".join(f"{row.name} {value}" for row, value in zip(rows, shown, strict=True))]


def setting_remarks(rows: list[Row]) -> list[str]:
    """What rows differ in besides the model: of two such rows the difference may come from that."""
    notes, limits = [], [row.settings.get("limit") for row in rows]
    limited = any(limit is not None for limit in limits) and len({str(limit) for limit in limits}) > 1
    for task in common_tasks(rows):
        for key, what in TOLD_APART.items():
            if not (limited and key == "samples"):  # limits have a remark of their own
                notes += _differences(rows, f"{task}: {what}", lambda row, t=task, k=key: row.tasks[t].get(k))
    if limited:
        shown = [
            "all items" if limit is None else limit if isinstance(limit, str) else f"{limit:g}" for limit in limits
        ]
        notes.append(f"limits differ: {', '.join(f'{r.name} {s}' for r, s in zip(rows, shown, strict=True))}")
    for what in dict.fromkeys(what for row in rows for what in row.settings if what != "limit"):
        notes += _differences(rows, what, lambda row, w=what: row.settings.get(w))
    return notes


def choice_remarks(rows: list[Row]) -> list[str]:
    """Which rows' weights were chosen on what."""
    notes = []
    for row in rows:
        chosen = row.summary.get("chosen")
        if chosen and chosen["held_out"]:
            notes.append(f"{row.name}: {said_of(chosen)} chosen on {', '.join(chosen['on'])}")
        elif chosen and len(chosen["candidates"]) > 1:
            notes.append(f"{row.name}: {said_of(chosen)} chosen on the very tasks it is reported on, which flatters it")
    return notes


def remarks(rows: list[Row]) -> list[str]:
    """What a reader must know before comparing these rows."""
    return setting_remarks(rows) + choice_remarks(rows)


# --- all of it ------------------------------------------------------------------------------------


def compare(paths: list[str], plot_path: Path, against: str | None = None) -> None:
    """Print the table of these results files, each row's paired differences from one of them with a verdict, and what
    to mind about both; draw the picture."""
    rows = read_rows(paths)
    reference = reference_row(rows, against)
    found = differences(rows, against)
    _print_with_notes(table(rows), remarks(rows))
    if found:
        print(f"\nDifferences from {reference.name} in points ± standard error, on the same items:\n")
        _print_with_notes(verdict_table(rows, found, reference), pairing_remarks(found, reference))
    draw(rows, found, reference, plot_path)
    print(f"wrote {plot_path}")


def _print_with_notes(text: str, notes: list[str]) -> None:
    print("\n".join([text, *(f"- {note}" for note in notes)]))
