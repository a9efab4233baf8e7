"""The pictures of pruning: what is drawn is what the reports say, and it is drawn as they say."""

import json
import math
from fnmatch import fnmatch

import pytest
from checkpoints import chain, prune_arguments, refusal, run, usage_error
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from common.pruners.heatmaps import (
    COLUMNS,
    Pruned,
    _row_label,
    axes_of,
    colour_range,
    draw,
    matrix,
    method,
    read_pruned,
    side_labels,
)
from common.pruners.report import KINDS

NAN = math.nan
MAGNITUDE = ["--pruning_method", "magnitude"]


@pytest.fixture(scope="module")
def pruned_both_ways(tmp_path_factory):
    """pa, pb: pruned by nm; ma, mb: the same vectors by magnitude."""
    folder = chain(tmp_path_factory.mktemp("heatmaps"))
    run("prune", *prune_arguments(folder))
    run(
        "prune",
        "--task_vector_paths",
        folder / "va",
        folder / "vb",
        "--save_directories",
        folder / "ma",
        folder / "mb",
        *MAGNITUDE,
    )
    return folder


def entry(kind: str, numel: int = 4, l2_share=0.5, evenness=1.0, **overlap) -> dict:
    return {
        "kind": kind,
        "numel": numel,
        "density": 0.25,
        "l2_share": l2_share,
        "evenness": evenness,
        "overlap": overlap,
    }


def report(tensors: dict, vector="a", position=1, **parameters) -> dict:
    own = {"pruning_method": "nm", "n": 1, "m": 4, "conflict_aware": True, "evenness_over_groups_of": 4}
    return (
        own | parameters | {"vector": vector, "position": position, "totals": entry("all", b=0.5), "tensors": tensors}
    )


# --- matrices -------------------------------------------------------------------------------------


def expected(directory, measure: str, patterns: list[list[str]]) -> list[list[float]]:
    """The mean over the tensors of each pattern, by elements, straight from the file."""
    tensors = json.loads((directory / "prune_report.json").read_text())["tensors"]
    out = []
    for row in patterns:
        out.append([])
        for pattern in row:
            found = [e for name, e in tensors.items() if fnmatch(name, pattern)]
            values = [e[measure] if measure != "overlap" else list(e["overlap"].values())[0] for e in found]
            pairs = [(v, e["numel"]) for v, e in zip(values, found, strict=True) if v is not None]
            out[-1].append(sum(v * n for v, n in pairs) / sum(n for _, n in pairs) if pairs else NAN)
    return out


PATTERNS = [
    ["*embed*"] * 2,
    ["*layers.0*q_proj*", "*layers.0*up_proj*"],
    ["model.norm.*"] * 2,
    ["lm_head*"] * 2,
]


@pytest.mark.parametrize("measure", ["overlap", "l2_share", "evenness"])
@pytest.mark.parametrize("name", ["pa", "pb", "ma", "mb"])
def test_the_matrix_is_what_the_report_says(pruned_both_ways, name, measure):
    """q holds a weight and a bias; embeddings above the layers, final norm and head below."""
    found = read_pruned([str(pruned_both_ways / name)]).reports[0]
    rows, kinds = axes_of([found])
    assert rows == [("", "embeddings"), ("model.layers.0", ""), ("", "norms"), ("", "head")]
    assert kinds == ["q", "up"]
    for drawn, wanted in zip(
        matrix(found, measure, rows, kinds), expected(pruned_both_ways / name, measure, PATTERNS), strict=True
    ):
        assert drawn == pytest.approx(wanted, nan_ok=True)


def test_cabs_differs_from_magnitude(pruned_both_ways):
    """What the picture is for; the only overlap of CABS is in the last groups, shorter than m."""
    cabs, magnitude = (read_pruned([str(pruned_both_ways / name)]).reports[0]["totals"] for name in ("pa", "ma"))
    assert cabs["evenness"] == 1
    assert max(cabs["overlap"].values()) < 0.03 < 0.08 < min(magnitude["overlap"].values())


def test_overlap_is_the_mean_over_the_other_vectors():
    tensors = {"h.0.q_proj": entry("q", b=0.2, c=0.4), "h.1.q_proj": entry("q", b=0.2, c=None)}
    one = report(tensors | {"h.2.q_proj": entry("q")})
    rows, kinds = axes_of([one])
    assert matrix(one, "overlap", rows, kinds) == [
        [pytest.approx(0.3)],
        [0.2],
        [pytest.approx(NAN, nan_ok=True)],
    ]


def test_several_tensors_of_a_kind_count_by_their_elements():
    tensors = {
        "h.0.norm1": entry("norms", 1, 0.9),
        "h.0.norm2": entry("norms", 3, 0.5),
        "h.0.ln": entry("norms", 7, None),
    }
    one = report(tensors)
    assert matrix(one, "l2_share", *axes_of([one])) == [[pytest.approx(0.6)]]


def test_layers_are_in_order_of_depth_stack_by_stack():
    names = [
        "encoder.block.10.q",
        "encoder.block.9.q",
        "decoder.block.0.q",
        "decoder.block.0.moe.experts.7.up",
    ]
    rows, kinds = axes_of([report({name: entry(name.rpartition(".")[2]) for name in names})])
    assert rows == [("encoder.block.9", ""), ("encoder.block.10", ""), ("decoder.block.0", "")]
    assert kinds == ["q", "up"]


def test_buffers_are_not_drawn():
    tensors = {"h.0.q": entry("q"), "h.7.inv_freq": {"hash": "0"}}
    assert axes_of([report(tensors)]) == ([("h.0", "")], ["q"])


def test_reports_of_earlier_versions_are_drawn(panels, tmp_path, monkeypatch):
    """They call a kind a group and a group a run."""
    titles = []
    monkeypatch.setattr(SubFigure, "suptitle", lambda figure, title, **how: titles.append(title))
    old = report({"h.0.q": {"group": "q"} | {k: v for k, v in entry("q", b=0.1).items() if k != "kind"}})
    old["evenness_over_runs_of"] = old.pop("evenness_over_groups_of")
    (tmp_path / "prune_report.json").write_text(json.dumps(old))
    draw([read_pruned([str(tmp_path)])], tmp_path / "old.svg")
    assert len(panels) == 3 and "evenness over groups of 4" in titles


def test_rows_say_the_place_in_the_order_of_pruning():
    first, third = (
        report({}, vector=f"models/{n}", position=p, order=["a", "b", "c"]) for n, p in (("a", 1), ("c", 3))
    )
    side = Pruned((first, third), "models/a")
    assert [_row_label([side], j) for j in (0, 1)] == ["a (pruned 1 of 3)", "c (pruned 3 of 3)"]
    assert _row_label([Pruned((report({}, order=["a"]),), "models/a")], 0) == "a"


def test_every_kind_of_the_report_has_a_column():
    assert {kind for kind, _ in KINDS} | {"other"} == set(COLUMNS)


# --- picture --------------------------------------------------------------------------------------


def test_colour_ranges():
    assert colour_range("overlap", [0.31, 0.12, NAN]) == (0, 0.35)
    assert colour_range("overlap", [0.0, 0.0]) == (0, 0.05)
    assert colour_range("l2_share", [0.61, 0.74]) == (0.6, 0.75)
    assert colour_range("evenness", [1.0, 1.0]) == (0.95, 1)
    assert colour_range("l2_share", [NAN]) == (0, 1)


@pytest.fixture
def panels(monkeypatch) -> list:
    """(values, colour range) of every panel, as matplotlib gets them."""
    seen, own = [], Axes.pcolormesh

    def pcolormesh(axis, *arrays, **settings):
        if len(arrays) == 1:  # not a colour bar, which is drawn with edges
            seen.append((arrays[0], (settings["norm"].vmin, settings["norm"].vmax)))
        return own(axis, *arrays, **settings)

    monkeypatch.setattr(Axes, "pcolormesh", pcolormesh)
    return seen


@pytest.mark.slow
def test_two_runs_side_by_side_share_a_scale(pruned_both_ways, panels, tmp_path):
    """Per measure a row per vector, magnitude left of nm; a picture with the colours of three scales comes out."""
    from matplotlib.image import imread

    runs = [read_pruned([str(pruned_both_ways / f"{kind}{j}") for j in "ab"]) for kind in "mp"]
    draw(runs, tmp_path / "two.png")
    order = [(measure, name) for measure in ("overlap", "l2_share", "evenness") for name in ("ma", "pa", "mb", "pb")]
    assert len(panels) == len(order)
    for (measure, name), (values, _) in zip(order, panels, strict=True):
        for drawn, wanted in zip(values, expected(pruned_both_ways / name, measure, PATTERNS), strict=True):
            assert drawn == pytest.approx(wanted, nan_ok=True)
    scales = [{scale for _, scale in panels[i : i + 4]} for i in (0, 4, 8)]
    assert all(len(scale) == 1 for scale in scales)
    for values, (low, high) in panels:
        assert all(low <= value <= high for row in values for value in row if not math.isnan(value))
    picture = imread(tmp_path / "two.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, picture.shape[2])}) > 100


def test_one_vector_alone_has_no_overlap_to_draw(panels, tmp_path):
    alone = report({"h.0.q": entry("q", l2_share=None)}) | {"totals": entry("all")}
    draw([Pruned((alone,), "x")], tmp_path / "one.svg")
    assert len(panels) == 2
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_deep_models_fit(panels, tmp_path):
    tensors = {f"model.layers.{i}.{kind}": entry(kind, b=0.1) for i in range(126) for kind in ("q", "k")}
    draw([Pruned((report(tensors),), "x")], tmp_path / "deep.png")
    assert [len(values) for values, _ in panels] == [126] * 3


def test_runs_are_told_apart():
    nm, other = report({}, "v/a"), report({}, "v/b")
    assert side_labels([Pruned((nm,), "x"), Pruned((nm | {"n": 2},), "y")]) == ["CABS 1:4", "CABS 2:4"]
    assert side_labels([Pruned((nm,), "x"), Pruned((other,), "y")]) == ["CABS 1:4\na first", "CABS 1:4\nb first"]
    assert side_labels([Pruned((nm,), "p/x"), Pruned((nm,), "p/y")]) == ["CABS 1:4\nx", "CABS 1:4\ny"]
    assert method(report({}, conflict_aware=False)) == "nm 1:4"
    assert method(report({}, pruning_method="magnitude", density=0.5)).startswith(
        "magnitude, 50 % kept"
    )  # as asked for
    assert method(report({}, pruning_method="random", rescale=True)) == "random, 25 % kept\nconflict-aware, rescaled"


# --- the script -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_prune_draws_its_own_run_beside_another(pruned_both_ways, panels, tmp_path, capsys):
    outputs = [tmp_path / "b", tmp_path / "a"]
    run(
        "prune",
        "--task_vector_paths",
        pruned_both_ways / "vb",
        pruned_both_ways / "va",
        "--save_directories",
        *outputs,
        "--n",
        1,
        "--m",
        4,
        "--plot_path",
        tmp_path / "p.png",
        "--plot_with",
        pruned_both_ways / "mb",
        pruned_both_ways / "ma",
    )
    assert len(panels) == 12
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'p.png'}\n")


@pytest.mark.slow
def test_reports_of_earlier_runs_are_drawn_without_pruning(pruned_both_ways, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(
        "prune",
        "--plot_path",
        "p.pdf",
        "--plot_reports",
        pruned_both_ways / "pb",
        pruned_both_ways / "pa" / "prune_report.json",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["p.pdf"]


USAGE = [
    (["--plot_reports", "a"], "--plot_reports and --plot_with need --plot_path, where the picture goes"),
    (
        ["--plot_reports", "a", "--plot_path", "p.gif"],
        "argument --plot_path: 'p.gif' does not end in .png, .pdf or .svg",
    ),
    (
        ["--plot_reports", "a", "--plot_path", "p.png", "--n", 3, "--dry_run"],
        "--plot_reports does not go with --dry_run, --n",
    ),
    (
        ["--plot_reports", "a", "--plot_path", "p.png", "--plot_with", "b", "c"],
        "--plot_with names 2 outputs of another way of pruning, and this job has 1",
    ),
]


@pytest.mark.parametrize("flags, line", USAGE)
def test_flags_that_contradict_are_usage_errors(capsys, flags, line):
    assert usage_error(capsys, "prune", *flags) == line


def test_no_report_is_refused_before_anything_is_pruned(pruned_both_ways, tmp_path):
    line = f"{pruned_both_ways / 'va'}: no prune_report.json there; give a directory that prune_task_vector_7b.py wrote"
    assert refusal("prune", "--plot_path", tmp_path / "p.png", "--plot_reports", pruned_both_ways / "va") == line
    pruning = ["--task_vector_paths", pruned_both_ways / "va", "--save_directories", tmp_path / "out"]
    assert refusal("prune", *pruning, "--plot_path", tmp_path / "p.png", "--plot_with", pruned_both_ways / "va") == line
    assert list(tmp_path.iterdir()) == []


GOOD = report({"h.0.q": entry("q", b=0.5)})
FORGED = [
    {"tensors": []},
    {"tensors": {}},
    {"tensors": {"a": "b"}},
    {"totals": None},
    {"vector": 3},
    {"position": None},
    {"density": "a quarter"},
    {"order": 2},
    {"tensors": {"a": entry("q") | {"l2_share": 1e400}}},
    {"tensors": {"a": entry("q") | {"numel": "4"}}},
    {"tensors": {"a": entry("q") | {"overlap": {"b": "0.5"}}}},
    {"tensors": {"a": {"kind": "q"}}},
    {"tensors": {"a": entry("q") | {"kind": ["q"]}}},
    {"tensors": {"a": entry("q", evenness=NAN)}},
]


@pytest.mark.parametrize("change", FORGED)
def test_a_report_that_is_none_is_refused(tmp_path, change):
    path = tmp_path / "prune_report.json"
    path.write_text(json.dumps(GOOD))
    read_pruned([str(path)])
    path.write_text(json.dumps(GOOD | change))
    assert refusal("prune", "--plot_path", tmp_path / "p.png", "--plot_reports", tmp_path) == (
        f"{path}: not as prune_task_vector_7b.py writes it; prune again"
    )
