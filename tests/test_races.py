"""Races between weights, over real merges: what is scored, recorded, resumed, refused; lm-eval stood in for where it
can be.
"""

import csv
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from long_tasks import EVAL, LOSS, TASKS, change_task, race, results, stopping_after
from recipes_and_models import RECIPE, left_over, merge_and_score, write_yaml

import merge_and_evaluate_7b
from common.errors import DataError
from common.shards.hashing import text_hash
from merge_and_evaluate import racing
from merge_and_evaluate.race_plan import ROUNDS

pytestmark = pytest.mark.usefixtures("long_tasks")
RACE = ("0.5", "--weights", "0.1", "0.3", "0.6", "0.9", "1.2", "--choose_on", "colours", "tints")


# --- what a race does -----------------------------------------------------------------------------


def test_a_race_scores_nothing_twice_and_finds_the_peak(here, asked, capsys):
    race(*RACE)
    said = capsys.readouterr().out
    assert len(set(asked)) == len(asked) < 5 * 1000
    assert {task for _, task, _ in asked} == {"colours", "tints"}
    by_weight = {weight: sum(w == weight for w, _, _ in asked) for weight in ("0.1", "0.9")}
    assert by_weight["0.1"] < by_weight["0.9"], "the worst drops out before the winner is certain"
    summary = results(here)["summary"]
    assert summary["weights"] == [0.9] and list(summary["tasks"]) == ["shades"]
    chosen = summary["chosen"]
    assert (
        chosen["race"] == {"points": 0.5, "seed": 0}
        and chosen["items"] == len(asked)
        and chosen["items_of_all"] == 5000
    )
    assert {"after_round", "difference", "stderr", "worse"} <= chosen["candidates"][0]["dropped"].keys()
    assert "dropped" not in chosen["candidates"][3]
    assert f"the race took {len(asked):,} of 5,000 items" in said and "0.1 drops out after" in said
    assert "at most 25 merges and 20,000 requests (4,000 for each of 5) to choose" in said
    assert left_over(here) == {"merged", "results.json", "results_race.json", "results_sweep.csv", "results_sweep.png"}


@pytest.mark.slow
def test_all_candidates_of_a_round_answer_the_same_items(here, asked):
    race(*RACE)
    first = {weight: {(t, i) for w, t, i in asked if w == weight} for weight in ("0.1", "0.3", "0.6", "0.9", "1.2")}
    smallest = min(first.values(), key=len)
    assert all(smallest <= items for items in first.values())
    assert len(smallest) <= 1000 * ROUNDS[0]


@pytest.mark.slow
def test_another_seed_draws_other_items(here, asked):
    race(*RACE)
    before = set(asked)
    asked.clear()
    race(*RACE, "--seed", "1", "--output_path", "other.json", "--overwrite")
    assert set(asked) != before


@pytest.mark.slow
def test_a_race_by_gold_reads_the_probabilities_and_shows_them(here, asked, capsys):
    race(*RACE, "--choose_by", "gold")
    said = capsys.readouterr().out
    assert results(here)["summary"]["weights"] == [0.9] and results(here)["summary"]["chosen"]["by"] == "gold"
    assert "hundredths of a nat behind 0.9" in said and "points" not in said
    kept = json.loads((here / "results_race.json").read_text())["candidates"]["0.9"]["items"]
    means = [np.mean(np.log(kept[task]["gold"])) for task in ("colours", "tints")]
    with open("results_sweep.csv") as file:
        (line,) = [line for line in csv.DictReader(file) if line["chosen"] == "1"]
    assert float(line["gold"]) == pytest.approx(np.mean(means)) and 0 < float(line["gold_stderr"]) < 0.1
    assert f"| **{np.mean(means):.4f} ± " in said and "log p of the right answer, nats (chooses) |" in said


@pytest.mark.slow
def test_values_are_turned_round_where_less_is_better(here, asked):
    """The worst accuracy wins if the task says that less is better."""
    for task in TASKS:
        path = here / "tasks" / f"{task}.yaml"
        config = json.loads(path.read_text())
        config["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
        path.write_text(json.dumps(config))
    race(*RACE)
    assert results(here)["summary"]["weights"] == [0.1]


@pytest.mark.slow
def test_a_race_without_choose_on_scores_the_winner_in_full(here, asked, capsys):
    race("0.5", "--weights", "0.3", "0.9")
    summary = results(here)["summary"]
    assert list(summary["tasks"]) == list(TASKS) and summary["chosen"]["held_out"] is False
    assert "which flatters it" in capsys.readouterr().out


# --- resumed --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_stopped_race_resumes(here, asked, monkeypatch, stop_after):
    """Stopped in any batch: what was asked before is not asked again, and what comes out is what one go gives."""
    race(*RACE)
    whole, outcome = list(asked), results(here)["summary"]["chosen"]
    for path in (here / "results.json", here / "results_race.json"):
        path.unlink()
    asked.clear()
    stand_in = racing.score_items
    monkeypatch.setattr(racing, "score_items", stopping_after(stop_after, stand_in))
    with pytest.raises(KeyboardInterrupt):
        race(*RACE, "--overwrite")
    assert 0 < len(asked) < len(whole)
    monkeypatch.setattr(racing, "score_items", stand_in)
    race(*RACE, "--overwrite")
    assert sorted(asked) == sorted(whole)
    again = results(here)["summary"]["chosen"]
    assert again == outcome
    asked.clear()
    race(*RACE)  # done: nothing is scored, the table is printed again
    assert asked == []


@pytest.mark.slow
def test_a_smaller_margin_scores_only_what_is_missing(here, asked):
    race("30", *RACE[1:])
    before = set(asked)
    race(*RACE, "--overwrite")
    assert before < set(asked) and len(asked) == len(set(asked))


@pytest.mark.slow
def test_a_race_of_other_models_is_not_taken(here, asked):
    race(*RACE)
    write_yaml(here / "eval.yml", {**EVAL, "num_fewshot": 1})
    (here / "results.json").unlink()
    with pytest.raises(
        DataError, match="results_race.json: weight 0.1 was scored there with other models, tasks or settings"
    ):
        race(*RACE)


# --- refused --------------------------------------------------------------------------------------


TEXT = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{thing}}"}
ROLLING |= {"metric_list": [{"metric": "word_perplexity"}]}


@pytest.mark.parametrize(
    "task, flags, line",
    [
        ({}, ["--race", "--weights", "0.3", "--choose_on", "colours"], "a race needs two candidates or more and got 1"),
        ({}, ["--race", "--weights", "0.3", "0.30"], "a race needs two candidates or more and got 1"),
        (
            {},
            ["--weights", "1", "2", "--choose_on", "colours", "--report_on", "colours"],
            "would choose the weight and report",
        ),
        (
            LOSS,
            ["--race", "--weights", "1", "2", "--choose_on", "colours", "tints"],
            "of some of colours, tints less is better",
        ),
        (
            LOSS,
            ["--weights", "1", "2", "--choose_on", "colours", "tints"],
            "so no average can choose; name tasks of one kind",
        ),
        (
            TEXT,
            ["--weights", "1", "2", "--choose_on", "colours", "--choose_by", "gold"],
            "task 'colours' is not multiple choice",
        ),
        (
            TEXT,
            ["--race", "--weights", "1", "2", "--choose_on", "colours", "--choose_by", "gold"],
            "not multiple choice",
        ),
        (
            ROLLING,
            ["--race", "--weights", "1", "2", "--choose_on", "colours"],
            "word_perplexity is not a mean over items, and a race",
        ),
    ],
)
def test_refused_before_anything_is_merged(here, task, flags, line):
    change_task(here, "colours", **task)
    for dry in ([], ["--dry_run"]):
        if dry and "--race" not in flags and task:
            continue  # a sweep's dry run reads no data
        with pytest.raises(DataError, match=re.escape(line)):
            merge_and_score(*flags, *dry)
        assert left_over(here) == set()


@pytest.mark.parametrize("way", [["--race", "--weights", "1", "2"], ["--search", "cma", "--evaluations", "4"]])
def test_a_weight_that_is_no_number_is_refused(here, way):
    write_yaml(here / "recipe.yml", {**RECIPE, "models": [{"model": "./wild", "parameters": {"weight": [0.1, 0.9]}}]})
    with pytest.raises(DataError, match=r"recipe.yml: ./wild: weight is \[0.1, 0.9\]; a sweep needs one number there"):
        merge_and_score(*way, "--choose_on", "colours")


def test_samples_are_the_races_own(here):
    write_yaml(here / "eval.yml", {**EVAL, "samples": {"colours": [0]}})
    with pytest.raises(DataError, match="eval.yml: has `samples`, which a race sets itself"):
        race(*RACE)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--race"], "--race needs --weights or --weight_grid, or several recipes"),
        (["--race", "--search", "cma", "--evaluations", "3"], "--search does not go with --race"),
        (["--search", "cma", "--evaluations", "3"], "--search needs --choose_on"),
        (["--search", "cma", "--choose_on", "a"], "--search needs --evaluations"),
        (["--evaluations", "3"], "--evaluations needs --search"),
        (["--layer_groups", "3"], "--layer_groups needs --search"),
        (["--search", "cma", "--weights", "1"], "--search does not go with --weights"),
        (["--race", "--weights", "1", "2", "--keep_models"], "--race does not go with --keep_models"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number of at least 0"),
        (["--seed", "1.5"], "argument --seed: '1.5' is not a whole number of at least 0"),
        (["--weights", "1", "--race", "-0.1"], "argument --race: '-0.1' is below 0; a margin is 0 or more"),
        (["--recipe", "a", "b", "--merge_only"], "--merge_only takes one recipe, and --recipe names 2"),
        (
            ["--recipe", "a", "b", "--search", "cma", "--evaluations", "3", "--choose_on", "x"],
            "--search takes one recipe, and --recipe names 2",
        ),
        (
            ["--recipe", "a", "--choose_on", "x"],
            "--choose_on needs --weights or --weight_grid or --search, or several recipes",
        ),
        (["--search", "anneal"], "argument --search: invalid choice: 'anneal' (choose from 'cma')"),
        (["--eval_only", "--race", "0"], "--eval_only does not go with --race"),
    ],
)
def test_usage(capsys, flags, line):
    with pytest.raises(SystemExit) as stop:
        merge_and_evaluate_7b.parse_args(flags)
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"error: {line}\n")


def test_dry_run_says_the_cost_and_writes_nothing(here, capsys):
    race(*RACE, "--dry_run")
    said = capsys.readouterr().out
    assert "cost    at most 10 merges and 4,000 requests (800 for each of 5) to choose" in said
    assert "GB  more, for the model that candidates are merged into; none is written" in said
    assert "writes  results_race.json" in said
    merge_and_score("--search", "cma", "--evaluations", "7", "--choose_on", "tints", "--dry_run")
    said = capsys.readouterr().out
    assert "cost    at most 7 merges and 2,240 requests (320 for each of 7) to choose" in said
    assert left_over(here) == set()


# --- through lm-eval ------------------------------------------------------------------------------


@pytest.mark.slow
def test_scored_items_are_those_of_a_whole_evaluation(here):
    """Batches of a race, put together, hold the very items, values and golds of results files of a plain sweep."""
    merge_and_score("--weights", "0.3", "0.9", "--choose_on", "colours", "tints")
    race(
        "0", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints", "--output_path", "raced.json", "--overwrite"
    )
    entries = json.loads((here / "raced_race.json").read_text())["candidates"]
    for weight in ("0.3", "0.9"):
        plain = json.loads((here / f"results_weight_{weight}.json").read_text())["items"]
        for task, kept in entries[weight]["items"].items():
            assert len(set(kept["number"])) == len(kept["number"])
            assert entries[weight]["documents"][task] == text_hash(" ".join(plain[task]["doc"]))
            for at, number in enumerate(kept["number"]):
                assert kept["value"][at] == plain[task]["value"][number]
                assert kept["gold"][at] == pytest.approx(plain[task]["gold"][number], rel=1e-4)
    assert results(here)["summary"]["chosen"]["held_out"]


@pytest.mark.slow
def test_a_race_killed_for_real_resumes(here):
    """kill -9 after the first batches, with lm-eval itself; then the same command finishes, and what was recorded is
    kept."""
    command = [
        sys.executable,
        str(ROOT / "merge_and_evaluate_7b.py"),
        "--recipe",
        "recipe.yml",
        "--eval_recipe",
        "eval.yml",
    ]
    command += ["--save_path", "merged", "--race", "0.1", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = here / "results_race.json"
    while process.poll() is None and not record.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(record.read_text())["candidates"]
    assert not (here / "results.json").exists()
    race("0.1", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints")
    after = json.loads(record.read_text())["candidates"]
    for weight, entry in before.items():
        for task, kept in entry["items"].items():
            count = len(kept["number"])
            assert {key: found[:count] for key, found in after[weight]["items"][task].items()} == kept
    assert results(here)["summary"]["weights"] in ([0.3], [0.9])
