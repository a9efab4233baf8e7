"""The cheap and current eval recipes: each loads in lm-eval, each metric of the summary on documents of the real
schema.
"""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
from conftest import ROOT, save_model
from leaderboard import write_leaderboard_v2, write_metabench

import merge_and_evaluate_7b as script
from merge_and_evaluate.leaderboard_v2 import BBH_CHOICES, leaderboard_v2, normalized
from merge_and_evaluate.scores import summarize

RECIPES = ("open_llm_leaderboard_v2", "metabench", "metabench_secondary")
SIX = ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande", "gsm8k")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Stand-ins of the data sets, lm-eval's own files of these tasks in a folder, a model with room for the prompts."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("metabench", "leaderboard"):
        shutil.copytree(Path(lm_eval.tasks.__file__).parent / name, folder / "tasks" / name)
    write_metabench(folder)
    write_leaderboard_v2(folder)
    config = json.loads((save_model(folder / "model", 3) / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def at_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place / "cache"))
    return place


def evaluated(recipe: str, **changes) -> dict:
    """The results of the model by recipes/<recipe>.yml, task files taken from ./tasks (not all 14,000 read)."""
    import yaml

    config = yaml.safe_load(Path("recipes", f"{recipe}.yml").read_text()) | {"include_path": "./tasks"} | changes
    Path(f"local_{recipe}.yml").write_text(yaml.safe_dump(config))
    script.main(f"--eval_only --save_path model --eval_recipe local_{recipe}.yml --output_path {recipe}.json".split())
    return json.loads(Path(f"{recipe}.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_lm_eval_takes_it_and_its_commands_parse(name, monkeypatch):
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / f"{name}.yml").read_text()
    header = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    commands = [
        shlex.split(c.replace("\\\n", " "))
        for c in re.findall(r"^   ((?:python|lm_eval) (?:.*\\\n)*.*)$", header, re.M)
    ]
    assert [command[0] for command in commands][:2] == ["lm_eval", "python"]
    monkeypatch.setattr("sys.argv", commands[0])
    config = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    assert config.model_args == {"pretrained": "./models/merged"}
    args = script.parse_args(commands[1][2:])
    assert args.eval_only and str(args.eval_recipe) == f"recipes/{name}.yml"
    assert "\n# model: vllm\n" in text
    for command in commands[2:]:  # the same recipe with vLLM, in lm-eval's own words
        monkeypatch.setattr("sys.argv", command)
        assert EvaluatorConfig.from_cli(HarnessCLI().parse_args()).model == "vllm"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["metabench", "metabench_secondary"])
def test_metabench_on_documents_of_its_schema(at_place, recipe):
    document = evaluated(recipe)
    ending = "_secondary" if recipe.endswith("secondary") else ""
    metrics = {name: task["metric"] for name, task in document["summary"]["tasks"].items()}
    expected = {"arc": "acc_norm,none", "hellaswag": "acc_norm,none", "gsm8k": "exact_match,strict-match"}
    assert metrics == {f"metabench_{name}{ending}": expected.get(name, "acc,none") for name in SIX}
    for name, task in document["summary"]["tasks"].items():
        assert np.mean(document["items"][name]["value"]) == pytest.approx(task["value"])
    assert document["summary"]["average"] == pytest.approx(
        np.mean([t["value"] for t in document["summary"]["tasks"].values()])
    )


@pytest.mark.slow
def test_leaderboard_v2_tasks_on_documents_of_their_schema(at_place):
    groups = ["leaderboard_bbh", "leaderboard_gpqa", "leaderboard_musr", "leaderboard_mmlu_pro"]
    document = evaluated("open_llm_leaderboard_v2", tasks=groups)
    metrics = {name: task["metric"] for name, task in document["summary"]["tasks"].items()}
    assert metrics == dict.fromkeys(groups[:3], "acc_norm,none") | {"leaderboard_mmlu_pro": "acc,none"}
    shots = {name: task["num_fewshot"] for name, task in document["summary"]["tasks"].items()}
    assert shots == dict(zip(groups, (3, 0, 0, 5), strict=True))
    assert len([leaf for leaf in document["items"] if leaf.startswith("leaderboard_bbh_")]) == 24
    for leaf, record in document["items"].items():
        score = document["results"][leaf][metrics.get(leaf, "acc_norm,none")]
        assert np.mean(record["value"]) == pytest.approx(score), leaf
        assert all(0 < gold < 1 for gold in record["gold"])
    assert "leaderboard_v2" not in document["summary"]  # MATH and IFEval are missing: no average of the six


def test_the_chances_of_guessing_are_those_of_the_tasks():
    """lm-eval's own lists of choices say how many there are to guess from."""
    import yaml

    for path in (Path(lm_eval.tasks.__file__).parent / "leaderboard" / "bbh_mc").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if "dataset_name" in config:
            assert BBH_CHOICES[config["dataset_name"]] == len(config["doc_to_choice"]), path.stem


def board_results(score: float) -> dict:
    """lm-eval's `results` with this score everywhere."""
    from merge_and_evaluate.leaderboard_v2 import GROUPS, IFEVAL

    results = {name: {metric: score} for group, (metric, parts) in GROUPS.items() for name in (group, *parts)}
    results[IFEVAL] = {"prompt_level_strict_acc,none": score - 0.1, "inst_level_strict_acc,none": score + 0.1}
    return results


def test_averages_by_the_published_rules():
    """The documentation's example: GPQA 0.6 -> 46.67; MuSR 0.7, 0.4, 0.6 over 2, 5, 3 choices -> 40, 25, 40.04."""
    assert 100 * normalized(0.6, 4) == pytest.approx(46.67, abs=0.005)
    results = board_results(0.6)
    for part, score in (("murder_mysteries", 0.7), ("object_placements", 0.4), ("team_allocation", 0.6)):
        results[f"leaderboard_musr_{part}"]["acc_norm,none"] = score
    board = leaderboard_v2(results)
    assert board["tasks"]["leaderboard_musr"]["normalized"] == pytest.approx((0.4 + 0.25 + 0.4) / 3)
    assert board["tasks"]["leaderboard_mmlu_pro"]["normalized"] == pytest.approx((0.6 - 0.1) / 0.9)
    assert board["tasks"]["leaderboard_math_hard"]["normalized"] == pytest.approx(0.6)
    bbh = math.fsum((0.6 - 1 / n) / (1 - 1 / n) for n in BBH_CHOICES.values()) / 24
    assert board["tasks"]["leaderboard_bbh"]["normalized"] == pytest.approx(bbh)
    assert board["tasks"]["leaderboard_ifeval"] == {"raw": pytest.approx(0.6), "normalized": pytest.approx(0.6)}
    assert board["raw_average"] == pytest.approx(0.6)
    assert board["normalized_average"] == pytest.approx(np.mean([t["normalized"] for t in board["tasks"].values()]))
    assert leaderboard_v2(board_results(0.2))["tasks"]["leaderboard_gpqa"]["normalized"] == 0
    assert leaderboard_v2({"winogrande": {"acc,none": 0.5}}) is None


def test_the_leaderboard_group_is_opened():
    """lm-eval gives the group `leaderboard` an `acc` that is MMLU-Pro's alone; the summary has the six."""
    results = board_results(0.6) | {
        "leaderboard": {"acc,none": 0.6},
        "leaderboard_instruction_following": {"alias": "x"},
    }
    groups = ["leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_instruction_following"]
    document = {
        "results": results,
        "group_subtasks": {
            "leaderboard": groups,
            "leaderboard_bbh": [f"leaderboard_bbh_{name}" for name in BBH_CHOICES],
            "leaderboard_instruction_following": ["leaderboard_ifeval"],
        },
    }
    tasks = summarize(
        {
            **document,
            "results": {k: v for k, v in results.items() if "gpqa" not in k and "musr" not in k and "math" not in k},
        }
    )["tasks"]
    assert list(tasks) == ["leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_ifeval"]
    assert tasks["leaderboard_ifeval"]["metric"] == "prompt_level_strict_acc,none"
