"""Every command of recipes/README.md, as printed, in a workplace after the README's first steps."""

import json
import re
import shutil

import pytest
from checkpoints import files
from conftest import ROOT
from workplace import bash_commands, row_commands, run_all, shell

TEXT = (ROOT / "recipes" / "README.md").read_text()
PAGE, ROWS = bash_commands(TEXT), row_commands(TEXT)
PRINTED = [command for command in PAGE if "prune_task_vector_7b.py" in command]
PRUNE = [*PRINTED, *ROWS.values()]
*TABLE, MERGE = [command for command in PAGE if "merge_and_evaluate_7b.py" in command]
# The page's tasks are out of reach; the two that stand for them are split in the same way.
LOCAL = (
    "--choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k",
    "--choose_on colours --report_on hues",
)
THE_CHAIN_BEFORE = [
    "python convert_dtype.py",
    *(
        f"python extract_task_vector_7b.py --finetuned_model_path models/{model} "
        f"--base_model_path models/Mistral-7b-v0.1-float16 --save_path models/task_vector_{name}"
        for model, name in (("WildMarcoroni-Variant1-7B", "wildmarcoroni"), ("WestSeverus-7B-DPO-v2", "westseverus"))
    ),
]
PRUNED = ("pruned_vector_wildmarcoroni", "pruned_vector_westseverus")


@pytest.fixture(scope="module")
def extracted(workplace):
    """The workplace with both task vectors; its tasks stand for the leaderboard, whose data are out of reach."""
    run_all(THE_CHAIN_BEFORE, workplace)
    shutil.copy(workplace / "local_eval.yml", workplace / "recipes" / "open_llm_leaderboard.yml")
    return workplace


def flags(command: str) -> dict[str, list[str]]:
    """{flag: its values}: flags("python x.py --n 1 --paths a b") -> {"n": ["1"], "paths": ["a", "b"]}."""
    found = {}
    for word in command.split()[2:]:
        if word.startswith("--"):
            found[word.removeprefix("--")] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def test_there_are_as_many_as_rows():
    """The whole table in two loops and a comparison, a race of recipes; ten ways to prune, no two of them alike; a
    merge."""
    assert len(TABLE) == 4 and len(PAGE) == 7
    assert len(PRINTED) == 2 and len(ROWS) == 8 and len(set(PRUNE)) == 10


@pytest.mark.slow
def test_the_whole_table(extracted):
    """Every row of the paper's table by the three commands, then one table of them, in the page's order; the loop again
    takes what is there; last the recipes' own race."""
    parents, rows_of_all, side_by_side, best = (command.replace(*LOCAL) for command in TABLE)
    run_all([parents, rows_of_all], extracted)
    made = {path.name: path.read_bytes() for path in extracted.glob("results_*.json")}
    names = re.search("for recipe in (.*?);", rows_of_all).group(1)
    again = shell(rows_of_all.replace(names, "random cabs"), extracted)
    assert again.returncode == 0 and again.stdout.count(".json is from before\n") == 2, again.stderr
    assert {path.name: path.read_bytes() for path in extracted.glob("results_*.json")} == made
    chosen = json.loads((extracted / "results_magnitude.json").read_text())["summary"]["chosen"]
    assert chosen["race"]["points"] == 0.5 and len(chosen["candidates"]) == 6 and chosen["held_out"]
    done = shell(side_by_side, extracted)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"results_\{(.*?)\}", side_by_side)
    rows = [name for listed in names for name in listed.split(",")]
    assert re.findall(r"^\| ([\w.-]+) \|", done.stdout, re.MULTILINE)[1 : len(rows) + 1] == rows
    assert "Differences from baseline_task_arithmetic" in done.stdout
    assert (extracted / "results_comparison.png").read_bytes().startswith(b"\x89PNG")
    run_all([best], extracted)
    winner = json.loads((extracted / "results_best.json").read_text())["summary"]
    assert winner["chosen"]["recipe"] == winner["name"] and len(winner["chosen"]["candidates"]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("command", PRUNE, ids=lambda command: command.split("--overwrite ")[1].split(" --save")[0])
def test_prune(extracted, command):
    """What was asked for is what the reports say; the first of the list was pruned first."""
    run_all([command], extracted)
    asked = flags(command)
    for position, directory in enumerate(asked["save_directories"], 1):
        report = json.loads((extracted / directory / "prune_report.json").read_text())
        assert report["position"] == position and report["pruning_method"] == asked["pruning_method"][0]
        assert report["vector"].endswith(asked["task_vector_paths"][position - 1].removeprefix("./"))
        assert report["conflict_aware"] == ("no-conflict_aware" not in asked and "n" in asked)
        for number in asked.keys() & {"n", "m", "seed"}:
            assert report[number] == int(asked[number][0])
    assert not list((extracted / "models").glob("*.part"))


@pytest.mark.slow
def test_a_merge_of_each_pair(extracted):
    """Prune, merge and score as the page says, twice; plain mergekit reads the pair, too."""
    for row, command in enumerate(PRUNE[::6]):
        named = MERGE.replace("results_cabs_1_4.json", f"results_{row}.json").replace('"CABS 1:4"', f'"row {row}"')
        assert named != MERGE
        run_all([command, named], extracted)
    run_all(["mergekit-yaml recipes/ties.yml ./models/ties"], extracted)
    names = [json.loads((extracted / f"results_{row}.json").read_text())["summary"]["name"] for row in (0, 1)]
    assert names == ["row 0", "row 1"]
    assert all((extracted / "models" / name / "model.safetensors").is_file() for name in ("merged", "ties", *PRUNED))


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes(extracted):
    """--overwrite replaces the pair by the same files, nothing left beside them."""
    run_all([PRUNE[0]], extracted)
    before = {name: files(extracted / "models" / name) for name in PRUNED}
    run_all([PRUNE[0]], extracted)
    assert {name: files(extracted / "models" / name) for name in PRUNED} == before
