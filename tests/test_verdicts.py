"""--compare with items: every printed figure recomputed from the files, verdicts, and what is refused."""

import math
import re

import numpy as np
import pytest
from results_files import save, scored
from scipy.stats import norm

import merge_and_evaluate_7b as script
from common.errors import DataError
from merge_and_evaluate.scores import summarize

SIZES = {"arc_challenge": 400, "hellaswag": 900, "winogrande": 300}


def flipped(values: list[int], up: int, down: int) -> list[int]:
    """`values` with so many 0s turned to 1 and 1s to 0."""
    changed = np.array(values)
    changed[np.flatnonzero(changed == 0)[:up]] = 1
    changed[np.flatnonzero(np.array(values) == 1)[:down]] = 0
    return changed.tolist()


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base() -> dict[str, list[int]]:
    random = np.random.default_rng(0)
    return {task: (random.random(n) < 0.6).astype(int).tolist() for task, n in SIZES.items()}


def compare(capsys, *flags: str) -> list[str]:
    script.main(["--compare", *flags])
    return capsys.readouterr().out.splitlines()


def verdicts(lines: list[str]) -> dict[str, list[str]]:
    """{row: its cells} of the second table."""
    start = next(i for i, line in enumerate(lines) if line.startswith("| minus "))
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start + 2 :] if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def test_every_figure_is_the_one_from_the_items(base, capsys):
    better = {task: flipped(v, up=40, down=10) for task, v in base.items()}
    same = {task: flipped(v, up=6, down=7) for task, v in base.items()}
    save(a=scored("TA", base), b=scored("CABS", better), c=scored("DARE", same))
    rows = verdicts(compare(capsys, "a.json", "b.json", "c.json"))
    ps = {}
    for name, values in (("CABS", better), ("DARE", same)):
        differences, variances = [], []
        for cell, (task, first) in zip(rows[name], base.items(), strict=False):
            d = np.array(values[task], float) - np.array(first, float)
            stderr = math.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1) / len(d))
            ups, n = int((d > 0).sum()), int((d != 0).sum())
            tail = sum(math.comb(n, k) for k in range(max(ups, n - ups), n + 1)) / 2**n
            p = min(1.0, 2 * tail)
            shown = [float(x.replace("−", "-")) for x in re.findall(r"[+−]?\d+\.\d+", cell)]
            assert shown[:2] == pytest.approx([100 * d.mean(), 100 * stderr], abs=0.0051)
            assert ("<0.001" in cell and p < 0.001) or shown[2] == pytest.approx(p, abs=0.00051)
            differences.append(d.mean())
            variances.append(stderr**2)
        mean, stderr = np.mean(differences), math.sqrt(sum(variances)) / 3
        shown = [float(x.replace("−", "-")) for x in re.findall(r"[+−]?\d+\.\d+", rows[name][3])]
        assert shown == pytest.approx([100 * mean, 100 * stderr], abs=0.0051)
        ps[name] = 2 * norm.sf(abs(mean / stderr))
    assert rows["CABS"][4:] == ["<0.001", "better than TA"] and 2 * ps["CABS"] < 0.001
    assert float(rows["DARE"][4]) == pytest.approx(ps["DARE"], abs=0.0006)
    assert rows["DARE"][5].startswith("cannot tell: a difference this size takes about ")


@pytest.mark.slow
def test_against_turns_the_question_round(base, capsys):
    better = {task: flipped(v, up=40, down=10) for task, v in base.items()}
    save(a=scored("TA", base), b=scored("CABS", better))
    for against in ("CABS", "b.json"):
        assert verdicts(compare(capsys, "a.json", "b.json", "--against", against))["TA"][-1] == "worse than CABS"
    with pytest.raises(DataError, match="--against 'X': no such row; the rows are TA, CABS"):
        script.main(["--compare", "a.json", "b.json", "--against", "X"])


def test_identical_models_cannot_be_told_apart(base, capsys):
    save(a=scored("one", base), b=scored("two", base))
    row = verdicts(compare(capsys, "a.json", "b.json"))["two"]
    assert row == ["+0.00 ± 0.00 (1.000)"] * 3 + ["+0.00 ± 0.00", "1.000", "cannot tell: no difference on 1,600 items"]


def test_items_in_another_order_and_doubles_are_paired_by_name(capsys):
    """The item that is there twice counts twice, the first with the first; the order in the file does not matter."""
    first, second = scored("a", {"x": [0, 0, 1, 1]}), scored("b", {"x": [1, 0, 1, 1]})
    for document in (first, second):
        document["items"]["x"]["doc"] = ["d1", "d2", "d2", "d3"]
    turned = {key: second["items"]["x"][key][::-1] for key in ("doc", "value", "gold")}
    turned["value"] = [1, 0, 1, 1]  # d3 1, d2 0, d2 1, d1 1: the doubles in their order
    second["items"]["x"] = turned
    save(a=first, b=second)
    assert verdicts(compare(capsys, "a.json", "b.json"))["b"][0] == "+25.00 ± 25.00 (1.000)"


def test_mmlu_is_the_mean_of_its_subjects(capsys):
    """Subjects of 20 and 200 items count alike: (0.5 + 0.05)/2, and their variances likewise."""
    random = np.random.default_rng(3)
    small, large = [0] * 10 + [1] * 10, (random.random(200) < 0.5).astype(int).tolist()
    documents = {}
    for name, values in (
        ("a", {"mmlu_s": small, "mmlu_l": large}),
        ("b", {"mmlu_s": [1] * 20, "mmlu_l": flipped(large, 10, 0)}),
    ):
        document = scored(name, values)
        pooled = float(np.mean([v for part in values.values() for v in part]))
        document["results"]["mmlu"] = {"acc,none": pooled, "acc_stderr,none": 0.01}
        document["group_subtasks"] = {"mmlu": list(values)}
        document["summary"] = {"name": name, **summarize(document)}
        documents[name] = document
    save(**documents)
    shown = verdicts(compare(capsys, "a.json", "b.json"))["b"][0]
    d = np.array([1] * 10 + [0] * 10), np.array([1] * 10 + [0] * 190)
    stderr = math.sqrt(sum(part.var(ddof=1) / len(part) for part in d)) / 2
    assert shown.startswith(f"+27.50 ± {100 * stderr:.2f} (")


@pytest.mark.slow
def test_rows_without_items_or_on_other_items_say_so(base, capsys):
    old, other, few = (scored(name, base) for name in ("old", "other", "few"))
    del old["items"]
    for record in other["items"].values():
        record["doc"] = [doc[::-1] + "x" for doc in record["doc"]]
    few["items"]["winogrande"] = {key: values[:100] for key, values in few["items"]["winogrande"].items()}
    short = few["items"]["winogrande"]["value"]
    few["results"]["winogrande"]["acc,none"] = float(np.mean(short))
    few["n-samples"]["winogrande"]["effective"] = 100
    few["config"]["limit"] = 100
    few["summary"] = {"name": "few", **summarize(few)}
    save(a=scored("TA", base), b=old, c=other, d=few)
    lines = compare(capsys, "a.json", "b.json", "c.json", "d.json")
    rows = verdicts(lines)
    assert "(unpaired)" in rows["old"][0] and "(unpaired)" in rows["other"][3]
    names = "arc_challenge, hellaswag, winogrande"
    assert f"- old: {names}: unpaired, b.json has no items (score it again for a paired figure)" in lines
    assert f"- other: {names}: unpaired, no item in common with TA" in lines
    assert "- few: winogrande: paired on the 100 items that both have" in lines
    assert "- limits differ: TA all items, old all items, other all items, few 100" in lines
    assert any(line.startswith("| few (limit 100) | ") for line in lines[:8])
    assert rows["few (limit 100)"][2] == "+0.00 ± 0.00 (1.000)"


@pytest.mark.slow
def test_what_rows_differ_in_is_said(base, capsys):
    changed = scored(
        "B",
        base,
        config={"model_dtype": "torch.float32", "model_args": {"pretrained": "x", "max_length": 9}, "limit": None},
        chat_template_sha="abcdef0123",
    )
    first = scored("A", base, chat_template_sha=None)
    changed["provenance"]["versions"]["lm_eval"] = "0.4.9"
    save(a=first, b=changed)
    lines = compare(capsys, "a.json", "b.json")
    assert [line for line in lines if line.startswith("- ")] == [
        "- dtypes differ: A bfloat16, B float32",
        "- model_args differ: A none, B max_length=9",
        "- chat templates differ: A none, B abcdef01",
        "- lm_eval versions differ: A 0.4.13, B 0.4.9",
    ]


def test_less_is_better_is_better(capsys):
    documents = {}
    for name, shift in (("a", 0.0), ("b", -0.2)):
        values = {"wiki": (np.linspace(1.0, 3.0, 50) + shift + 0.01 * np.sin(np.arange(50) + shift)).tolist()}
        document = scored(name, values)
        document["higher_is_better"] = {"wiki": {"acc": False}}
        document["summary"] = {"name": name, **summarize(document)}
        documents[name] = document
    save(**documents)
    assert verdicts(compare(capsys, "a.json", "b.json"))["b"][-1] == "better than a"
    documents["b"]["higher_is_better"] = {}
    documents["b"]["summary"] = {"name": "b", **summarize(documents["b"])}
    save(**documents)
    with pytest.raises(DataError, match=re.escape("wiki: less is better in a (acc,none), more in another row")):
        script.main(["--compare", "a.json", "b.json"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"value": [1] * 4},
            "a.json: the items of 'x' have the mean 1.000000 but its score is 0.500000; it was changed",
        ),
        ({"doc": ["d"]}, "a.json: the items of 'x' are not three lists of one length (doc, value, gold)"),
        ({"value": ["y"] * 4}, "a.json: the items of 'x' hold something else than hashes and numbers"),
    ],
)
def test_items_that_do_not_fit_are_refused(change, line):
    document = scored("a", {"x": [0, 0, 1, 1]})
    document["items"]["x"].update(change)
    save(a=document)
    with pytest.raises(DataError) as error:
        script.main(["--compare", "a.json"])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.slow
def test_picture_has_the_differences(base, tmp_path, capsys):
    """Score and difference panels side by side; a file is written for one row, too."""
    from matplotlib.figure import Figure

    from merge_and_evaluate import scores_picture
    from merge_and_evaluate.rows import row_of
    from merge_and_evaluate.verdicts import differences

    rows = [row_of(scored(name, base), name) for name in ("A", "B")]
    drawn = []
    saved = scores_picture.save_figure
    try:
        scores_picture.save_figure = lambda figure, path: drawn.append(figure)
        scores_picture.draw(rows, differences(rows), rows[0], tmp_path / "x.png")
    finally:
        scores_picture.save_figure = saved
    titles = [axis.get_title() for axis in drawn[0].axes if axis.get_visible()]
    assert isinstance(drawn[0], Figure)
    assert titles == [t for name in ("average", *SIZES) for t in (name, "minus A")]
    save(a=scored("TA", base))
    assert compare(capsys, "a.json", "--plot_path", "one.png")[-1] == "wrote one.png"
