"""Pictures of what pruning did: layer x kind-of-tensor heat maps.

The reports of the vectors that were pruned together are a *side*: with several, they are drawn side by side. The
picture has a row of panels per vector, and per measure of prune_report.json one panel per side, on one colour scale.
Rows are layers, columns are kinds of tensors; what belongs to no layer (embeddings, final norm, head) is a bar over the
full width. A cell that stands for several tensors is their mean, weighted by their elements.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.pruners.report import NAME
from common.shards.documents import read_record

MEASURES = {"overlap": "overlap rate", "l2_share": "L2 share kept", "evenness": "evenness"}
COLOURS = {"overlap": "OrRd", "l2_share": "PuBu", "evenness": "YlGn"}
COLUMNS = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "norms", "other", "embeddings", "head")
ABOVE = {"embeddings": "embeddings"}  # bars above and below the layers: kind -> what the picture says
BELOW = {"norms": "final norm", "other": "other", "head": "head"}
MANY = 45  # rows, beyond which cells are too low for figures
FOOTNOTE = (
    "overlap rate: kept by both vectors / kept by either (mean over the other vectors).   "
    "L2 share: part of the vector's squared L2 norm that is in what is kept.\n"
    "evenness: how evenly what is kept is spread over groups of m elements, 1 = every group keeps as many.   "
    "In bold: the whole model.   Grey: nothing to measure."
)


@dataclass(frozen=True)
class Pruned:
    """Vectors that were pruned together: their reports, in the order of pruning, and the first one's directory."""

    reports: tuple[dict, ...]
    directory: str

    @property
    def names(self) -> list[str]:
        return [Path(report["vector"]).name for report in self.reports]


# --- reports --------------------------------------------------------------------------------------


def read_report(path: str) -> dict:
    """The prune_report.json at `path`, a file or a directory. Raises DataError if there is none or it is incomplete."""
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no {NAME} there; give a directory that prune_task_vector_7b.py wrote")
    report = read_record(file)
    if not _is_report(report):
        raise DataError(f"{file}: not as prune_task_vector_7b.py writes it; prune again")
    return report


def drawn_kind(entry: dict) -> str | None:
    """The kind of a tensor, as its entry says it; earlier versions called it its group. None: a buffer, not drawn."""
    kind = entry.get("kind", entry.get("group"))
    return kind if kind in COLUMNS else None


def _is_report(report: dict) -> bool:
    tensors, named = report.get("tensors"), isinstance(report.get("vector"), str)
    if not (isinstance(tensors, dict) and named and type(report.get("position")) is int):
        return False
    if not isinstance(report.get("order", []), list):
        return False
    if not _is_fraction(report.get("density")):
        return False
    if not all(isinstance(entry, dict) for entry in tensors.values()):
        return False
    measured = [entry for entry in tensors.values() if drawn_kind(entry)]
    return bool(measured) and all(_is_measured(entry) for entry in [report.get("totals"), *measured])


def _is_fraction(figure) -> bool:
    return figure is None or type(figure) in (int, float) and 0 <= figure <= 1


def _is_measured(entry) -> bool:
    """Whether an entry has the figures that are drawn: fractions, or None where there was nothing to measure."""
    if not isinstance(entry, dict) or not isinstance(entry.get("overlap"), dict):
        return False
    figures = [
        *entry["overlap"].values(),
        *(entry.get(key, "") for key in ("density", "l2_share", "evenness")),
    ]
    return all(map(_is_fraction, figures)) and type(entry.get("numel")) is int


def read_pruned(paths: list[str]) -> Pruned:
    """The reports of vectors that were pruned together, one path per vector, in any order."""
    reports = sorted(map(read_report, paths), key=lambda report: report["position"])
    return Pruned(tuple(reports), str(Path(paths[0])))


def method(report: dict) -> str:
    """How a report's vector was pruned, in a few words: "CABS 64:256", "magnitude, 25 % kept"."""
    kind, aware = report.get("pruning_method"), report.get("conflict_aware")
    if kind == "nm":
        words = f"{'CABS' if aware else 'nm'} {report.get('n')}:{report.get('m')}"
    else:
        # What was asked for: zeros of the vector make what is kept less.
        density = report.get("density", report["totals"]["density"]) or 0
        words = f"{kind}, {100 * density:.3g} % kept" + ("\nconflict-aware" if aware else "")
    return words + (", rescaled" if report.get("rescale") else "")


def side_labels(sides: list[Pruned]) -> list[str]:
    """What tells the sides apart: the method, or with one method the order of the vectors or the place."""
    labels = [method(side.reports[0]) for side in sides]
    if len(set(labels)) == len(labels):
        return labels
    firsts = [f"{side.names[0]} first" for side in sides]
    more = firsts if len(set(firsts)) == len(sides) else [Path(side.directory).name for side in sides]
    return [f"{label}\n{extra}" for label, extra in zip(labels, more, strict=True)]


# --- matrices -------------------------------------------------------------------------------------


def place(name: str, kind: str) -> tuple[str, str]:
    """(row, kind) of a tensor: ("model.layers.3", "q"), or, outside the layers, ("", "head")."""
    layer = re.match(r"(.*?\.\d{1,9})\.", name)
    return (layer[1] if layer else "", kind)


def measure_of(entry: dict, measure: str) -> float | None:
    """One figure of a tensor or a total; the overlap is the mean over all other vectors. None: nothing measured."""
    if measure != "overlap":
        return entry[measure]
    rates = [rate for rate in entry["overlap"].values() if rate is not None]
    return math.fsum(rates) / len(rates) if rates else None


def cells(report: dict, measure: str) -> dict[tuple[str, str], float]:
    """{(row, kind): figure}, the mean over the tensors there, weighted by their elements."""
    sums: dict[tuple[str, str], list[float]] = {}
    for name, entry in report["tensors"].items():
        value = measure_of(entry, measure) if drawn_kind(entry) else None
        if value is not None and entry["numel"]:
            total = sums.setdefault(place(name, drawn_kind(entry)), [0.0, 0.0])
            total[0] += value * entry["numel"]
            total[1] += entry["numel"]
    return {where: weighted / numel for where, (weighted, numel) in sums.items()}


def axes_of(reports: list[dict]) -> tuple[list[tuple[str, str]], list[str]]:
    """(rows from top to bottom, kinds from left to right) that hold every tensor of the reports.

    A row is (layer, "") or, for what belongs to no layer, ("", kind).
    """
    entries = [item for report in reports for item in report["tensors"].items()]
    places = dict.fromkeys(place(name, kind) for name, entry in entries if (kind := drawn_kind(entry)))
    outside, inside = ({kind for layer, kind in places if bool(layer) == within} for within in (False, True))
    stacks = list(dict.fromkeys(layer.rpartition(".")[0] for layer, _ in places if layer))

    def depth(layer: str) -> tuple[int, int]:
        stack, _, number = layer.rpartition(".")
        return stacks.index(stack), int(number)

    layers = sorted({layer for layer, _ in places if layer}, key=depth)
    below = dict.fromkeys(kind for kind in [*BELOW, *COLUMNS] if kind not in ABOVE)
    rows = [("", kind) for kind in ABOVE if kind in outside] + [(layer, "") for layer in layers]
    rows += [("", kind) for kind in below if kind in outside]
    return rows, [kind for kind in COLUMNS if kind in inside]


def matrix(report: dict, measure: str, rows: list[tuple[str, str]], kinds: list[str]) -> list[list[float]]:
    """What a panel shows, (rows, kinds), NaN where there is nothing; a row outside the layers is one value."""
    found = cells(report, measure)
    return [[found.get((layer, alone or kind), math.nan) for kind in kinds or [""]] for layer, alone in rows]


def colour_range(measure: str, values: list[float]) -> tuple[float, float]:
    """The ends of the colour scale, in steps of 0.05: overlap starts at 0, evenness ends at 1."""
    known = [value for value in values if not math.isnan(value)] or [0.0, 1.0]
    low, high = math.floor(min(known) * 20) / 20, math.ceil(max(known) * 20) / 20
    low, high = (0.0 if measure == "overlap" else low), (1.0 if measure == "evenness" else high)
    return (low, high) if low < high else (max(0.0, low - 0.05), max(0.05, high))


# --- picture --------------------------------------------------------------------------------------


def draw(sides: list[Pruned], path: Path) -> None:
    """Write the picture of one side, or of several with as many vectors each, to `path` (png, pdf, svg); say so."""
    from matplotlib.figure import Figure

    from common.pruners.pictures import save_figure

    reports = [report for side in sides for report in side.reports]
    rows, kinds = axes_of(reports)
    measures = [m for m in MEASURES if any(measure_of(r["totals"], m) is not None for r in reports)]
    cell = min(0.24, max(0.07, 6 / len(rows)))  # inches high
    width = len(measures) * (1.1 + len(sides) * (0.3 + 0.26 * max(len(kinds), 4)))
    height = 1.2 + len(sides[0].reports) * (0.9 + cell * len(rows))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("What pruning kept, layer by layer", fontsize=13)
    parts = figure.subfigures(1, len(measures), squeeze=False)[0]
    panels = [_draw_measure(part, sides, m, rows, kinds) for part, m in zip(parts, measures, strict=True)]
    for j, (leftmost, *_) in enumerate(panels[0]):
        leftmost.set_ylabel(_row_label(sides, j), fontsize=9)
    figure.supxlabel(FOOTNOTE, fontsize=8, color="dimgrey")
    save_figure(figure, path)
    print(f"wrote {path}")


def _draw_measure(part, sides: list[Pruned], measure: str, rows: list, kinds: list[str]):
    """One measure: a panel per vector and side, and the colour bar they share. Returns the panels' axes."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    drawn = [[matrix(report, measure, rows, kinds) for report in side.reports] for side in sides]
    values = [value for side in drawn for panel in side for row in panel for value in row]
    colours = ScalarMappable(Normalize(*colour_range(measure, values)), colormaps[COLOURS[measure]])
    panels = part.subplots(len(sides[0].reports), len(sides), squeeze=False, sharex=True, sharey=True)
    for j, across in enumerate(panels):
        for side, shown, label, axis in zip(sides, drawn, side_labels(sides), across, strict=True):
            _draw_panel(axis, shown[j], rows, kinds, colours)
            total = measure_of(side.reports[j]["totals"], measure)
            axis.set_title(("" if j else label + "\n") + _figure(total), fontsize=9, fontweight="bold")
    part.suptitle(_title(measure, sides), fontsize=11)
    part.colorbar(colours, ax=panels, shrink=0.6, aspect=40, pad=0.02).ax.tick_params(labelsize=7)
    return panels


def _title(measure: str, sides: list[Pruned]) -> str:
    if measure != "evenness":
        return MEASURES[measure]
    lengths = dict.fromkeys(str(_group_length(side.reports[0])) for side in sides)
    return f"evenness over groups of {' | '.join(lengths)}"


def _group_length(report: dict) -> int | None:
    """The m of the evenness; reports of earlier versions called a group a run."""
    return report.get("evenness_over_groups_of", report.get("evenness_over_runs_of"))


def _row_label(sides: list[Pruned], j: int) -> str:
    names = list(dict.fromkeys(side.names[j] for side in sides))
    # As the report says it: not every vector that was pruned need be in the picture.
    report = sides[0].reports[j]
    count = len(report.get("order", sides[0].reports))
    return " | ".join(names) + (f" (pruned {report['position']} of {count})" if count > 1 else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _draw_panel(axis, values: list[list[float]], rows: list, kinds: list[str], colours) -> None:
    """One matrix: a cell per layer and kind, a bar for what belongs to no layer."""
    columns, small = max(len(kinds), 1), len(rows) > MANY
    axis.set_facecolor("lightgrey")
    axis.set(xlim=(0, columns), ylim=(len(rows), 0))
    lines = {"edgecolors": "white", "linewidth": 0.25 if small else 0.6}
    axis.pcolormesh(values, cmap=colours.cmap, norm=colours.norm, **lines)
    for y, ((layer, _), across) in enumerate(zip(rows, values, strict=True)):
        if not layer and not math.isnan(across[0]):
            axis.broken_barh([(0, columns)], (y, 1), facecolor=colours.to_rgba(across[0]), **lines)
        for x, value in enumerate(across if layer else across[:1]):
            if not (small or math.isnan(value)):
                _annotate(axis, x + (0.5 if layer else columns / 2), y, value, colours)
    axis.set_xticks([x + 0.5 for x in range(len(kinds))], kinds, fontsize=8, rotation=90)
    axis.set_yticks(*_row_ticks(rows, 4 if small else 1), fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _annotate(axis, x: float, y: int, value: float, colours) -> None:
    red, green, blue, _ = colours.to_rgba(value)
    ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"
    axis.text(x, y + 0.53, _short(value), color=ink, fontsize=5.5, ha="center", va="center", in_layout=False)


def _short(value: float) -> str:
    """Two digits for a small cell: 0.314 -> ".31", 0.0 -> "0", 1.0 -> "1"."""
    return f"{value:g}" if value in (0, 1) else f"{value:.2f}".removeprefix("0")


def _row_ticks(rows: list[tuple[str, str]], step: int) -> tuple[list[float], list[str]]:
    """(heights, names) of the rows that get a name: what belongs to no layer, and every step-th layer."""
    named = [layer.rpartition(".") for layer, _ in rows]
    alone = len({stack for stack, dot, _ in named if dot}) == 1
    ticks = [
        (
            y + 0.5,
            (number if alone else f"{stack.split('.')[0]} {number}") if dot else (ABOVE | BELOW).get(kind, kind),
        )
        for y, ((stack, dot, number), (_, kind)) in enumerate(zip(named, rows, strict=True))
        if not dot or int(number) % step == 0
    ]
    return [y for y, _ in ticks], [name for _, name in ticks]
