"""The table and the picture of several results files, recomputed from the files."""

import json
import math
import re

import pytest

import merge_and_evaluate_7b as script
from common.errors import DataError
from merge_and_evaluate.scores import summarize

LEADERBOARD = ("arc_challenge", "hellaswag", "winogrande")


def write_results(path, scores: dict[str, float], stderr: float = 0.01, name: str | None = None, **summary) -> None:
    """A results file as lm-eval and our script write it, with these accuracies."""
    results = {task: {"acc,none": value, "acc_stderr,none": stderr} for task, value in scores.items()}
    document = {
        "results": results,
        "group_subtasks": {},
        "n-shot": dict.fromkeys(scores, 5),
        "n-samples": {},
        "higher_is_better": {},
    }
    if name:
        document["summary"] = {"name": name, **summarize(document), **summary}
        document["provenance"] = {"batch_size": 8, "versions": {"lm_eval": "0.4.13"}}
    path.write_text(json.dumps(document))


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """The working directory of --compare: a.json (TA) and b.json (CABS)."""
    write_results(tmp_path / "a.json", dict(zip(LEADERBOARD, (0.5, 0.625, 0.75), strict=True)), name="TA")
    write_results(tmp_path / "b.json", dict(zip(LEADERBOARD, (0.5, 0.5, 0.875), strict=True)), name="CABS")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(capsys, *files: str) -> list[str]:
    script.main(["--compare", *files])
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_table_is_what_the_files_say(scored, capsys):
    lines = compare(capsys, "a.json", "b.json")
    assert lines[0] == "| method | arc_challenge 5-shot | hellaswag 5-shot | winogrande 5-shot | average |"
    assert lines[2] == "| TA | **50.00 ± 1.00** | **62.50 ± 1.00** | 75.00 ± 1.00 | **62.50 ± 0.58** |"
    assert lines[3] == "| CABS | **50.00 ± 1.00** | 50.00 ± 1.00 | **87.50 ± 1.00** | **62.50 ± 0.58** |"
    for line, file in zip(lines[2:4], ("a.json", "b.json"), strict=True):
        results = json.loads((scored / file).read_text())["results"]
        shown = [float(cell) for cell in re.findall(r"([\d.]+) ±", line)]
        values = [100 * results[task]["acc,none"] for task in LEADERBOARD]
        assert shown == pytest.approx([*values, sum(values) / 3], abs=0.005)
        assert float(re.findall(r"± ([\d.]+)", line)[-1]) == pytest.approx(math.sqrt(3) / 3, abs=0.005)
    assert lines[-1] == "wrote results_comparison.png"
    assert (scored / "results_comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_average_is_over_what_all_have(scored, capsys):
    """A file with fewer tasks does not get a better average by leaving one out."""
    write_results(scored / "c.json", {"hellaswag": 0.25, "winogrande": 0.75}, name="C")
    lines = compare(capsys, "a.json", "c.json")
    assert lines[0].endswith("| average of hellaswag, winogrande |")
    assert lines[2].endswith("| **68.75 ± 0.71** |") and lines[3].startswith("| C | – |")
    write_results(scored / "d.json", {"gsm8k": 0.25}, name="D")
    lines = compare(capsys, "a.json", "d.json")
    assert lines[0].endswith("| average (no task in common) |") and lines[3].endswith("| – |")


def test_what_does_not_compare_is_said(scored, capsys):
    document = json.loads((scored / "b.json").read_text())
    document["summary"]["tasks"]["hellaswag"]["num_fewshot"] = 0
    document["provenance"]["batch_size"] = 1
    tried = [{"weights": [0.6]}, {"weights": [0.9]}]
    document["summary"]["chosen"] = {"weights": [0.9], "on": ["gsm8k"], "held_out": True, "candidates": tried}
    (scored / "b.json").write_text(json.dumps(document))
    document["summary"]["chosen"]["held_out"] = False
    (scored / "c.json").write_text(json.dumps(document))
    assert compare(capsys, "a.json", "b.json", "c.json")[5:9] == [
        "- hellaswag: shots differ: TA 5, CABS 0, CABS 0",
        "- batch sizes differ: TA 8, CABS 1, CABS 1",
        "- CABS: weight 0.9 chosen on gsm8k",
        "- CABS: weight 0.9 chosen on the very tasks it is reported on, which flatters it",
    ]


@pytest.mark.slow
def test_files_that_lm_eval_wrote_are_read(scored, capsys):
    write_results(scored / "results_2026.json", dict.fromkeys(LEADERBOARD, 0.25))
    lines = compare(capsys, "results_2026.json", "a.json")
    assert lines[2] == "| results_2026 | 25.00 ± 1.00 | 25.00 ± 1.00 | 25.00 ± 1.00 | 25.00 ± 0.58 |"


def test_less_is_better_where_the_task_says_so(scored, capsys):
    for name, value in (("a", 12.5), ("b", 14.0)):
        document = {
            "results": {"wiki": {"word_perplexity,none": value}},
            "higher_is_better": {"wiki": {"word_perplexity": False}},
        }
        (scored / f"{name}.json").write_text(json.dumps(document))
    assert compare(capsys, "a.json", "b.json")[2:4] == ["| a | **12.50** | **12.50** |", "| b | 14.00 | 14.00 |"]


def test_refusals(scored):
    for files, line in [
        (["a.json", "none.json"], "none.json: no such results file"),
        (["a.json", "list.json"], "list.json: a JSON object is needed"),
        (["a.json", "odd.json"], "odd.json: its `results` are not as lm_eval writes them"),
    ]:
        (scored / "list.json").write_text("[]")
        (scored / "odd.json").write_text('{"results": {"x": 3}}')
        with pytest.raises(DataError, match=re.escape(line)):
            script.main(["--compare", *files])
    with pytest.raises(
        DataError, match=r"plot.docx: matplotlib cannot write 'docx'; use a name that ends in .png, .pdf or .svg"
    ):
        script.main(["--compare", "a.json", "--plot_path", "plot.docx"])
