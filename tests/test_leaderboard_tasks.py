"""lm-eval's own leaderboard tasks on made-up items of their real schemas: shots, items, metrics, the README's
commands.
"""

import json
import re
import shutil
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
from conftest import ROOT, save_model
from leaderboard import SUBJECTS_FOR_SPEED, shots_in, write_leaderboard

import merge_and_evaluate_7b as script
from merge_and_evaluate.items import softmax_share

SHOTS = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}


TASK_FOLDERS = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k")


def copy_task_files(folder: Path) -> None:
    """lm-eval's own files of the six tasks: without them the 14,000 others would be read, too (8 seconds and more)."""
    for name in TASK_FOLDERS:
        shutil.copytree(Path(lm_eval.tasks.__file__).parent / name, folder / name)


def longer(model: Path) -> None:
    """Room for 25 demonstrations and 256 tokens of answer."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Path:
    """A copy of the repository's recipes beside stand-ins of the six data sets, and models where the recipes look.

    few.yml is the leaderboard with three of MMLU's subjects."""
    place = tmp_path_factory.mktemp("board")
    shutil.copytree(ROOT / "recipes", place / "recipes")
    write_leaderboard(place)
    for seed, name in enumerate(
        ("Mistral-7b-v0.1-float16", "pruned_vector_wildmarcoroni", "pruned_vector_westseverus")
    ):
        longer(save_model(place / "models" / name, seed))
    group = place / "recipes" / "lm_eval_tasks" / "open_llm_leaderboard.yaml"
    subjects = "".join(f"  - task: mmlu_{subject}\n    num_fewshot: 5\n" for subject in SUBJECTS_FOR_SPEED)
    few = (
        group.read_text()
        .replace("  - group: mmlu\n    num_fewshot: 5\n", subjects)
        .replace("group: open", "group: few_open")
    )
    copy_task_files(group.parent)
    copy_task_files(place / "few")
    (place / "few" / "few.yaml").write_text(few)
    recipe = {"include_path": "./few", "tasks": ["few_open_llm_leaderboard"], "batch_size": 8, "log_samples": True}
    (place / "few.yml").write_text(json.dumps(recipe))
    return place


@pytest.fixture
def at_board(board, monkeypatch):
    monkeypatch.chdir(board)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(board / "cache"))
    return board


def prompts(folder: Path, stem: str) -> dict[str, list[str]]:
    """{task: the prompt of each sample}, of results `stem`.json scored with log_samples."""
    found = {}
    for path in folder.glob(f"{stem}_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.stem.removeprefix(f"{stem}_samples_")] = [line["arguments"][0][0] for line in lines]
    return found


@pytest.mark.slow
def test_readme_sweep_scores_with_the_groups_shots(at_board, capsys):
    """arc and winogrande choose with 25 and 5 shots, the reported tasks have the group's too."""
    script.main(
        [
            "--recipe",
            "recipes/recipe.yml",
            "--eval_recipe",
            "few.yml",
            "--weights",
            "0.6",
            "1.2",
            "--choose_on",
            "arc_challenge",
            "winogrande",
            "--report_on",
            "hellaswag",
            "mmlu_anatomy",
            "truthfulqa_mc2",
            "gsm8k",
            "--save_path",
            "models/best",
            "--output_path",
            "best.json",
        ]
    )
    summary = json.loads((at_board / "best.json").read_text())["summary"]
    chosen = json.loads((at_board / "best_weight_0.6.json").read_text())["summary"]
    shots = {name: task["num_fewshot"] for s in (summary, chosen) for name, task in s["tasks"].items()}
    assert shots == {**SHOTS, "mmlu_anatomy": 5}
    counted = {**prompts(at_board, "best"), **prompts(at_board, "best_weight_0.6")}
    assert set(counted) == set(shots)
    for task, texts in counted.items():
        assert {shots_in(text, task) for text in texts} == {shots[task]}, task
    assert "arc_challenge 3 items 25-shot, winogrande 3 items 5-shot" in capsys.readouterr().out


@pytest.mark.slow
def test_items_are_the_score_for_every_kind_of_task(at_board):
    """acc, acc_norm, exact_match, mc2 and MMLU's subjects: the mean of the items, and gold by hand."""
    script.main(
        [
            "--eval_only",
            "--save_path",
            "models/Mistral-7b-v0.1-float16",
            "--eval_recipe",
            "few.yml",
            "--output_path",
            "base.json",
        ]
    )
    document = json.loads((at_board / "base.json").read_text())
    summary, items = document["summary"], document["items"]
    assert set(items) == set(summary["tasks"]) == {*SHOTS, *(f"mmlu_{s}" for s in SUBJECTS_FOR_SPEED)}
    for name, task in summary["tasks"].items():
        assert np.mean(items[name]["value"]) == pytest.approx(task["value"], abs=1e-12), name
        assert len(items[name]["doc"]) == task["samples"] == len(set(items[name]["doc"]))
    assert summary["tasks"]["arc_challenge"]["metric"] == "acc_norm,none"
    assert items["gsm8k"]["gold"] == [None] * 3
    assert items["truthfulqa_mc2"]["gold"] == pytest.approx(items["truthfulqa_mc2"]["value"], rel=1e-6)
    for task in ("arc_challenge", "winogrande", "hellaswag", "mmlu_anatomy"):
        samples = [json.loads(line) for line in (at_board / f"base_samples_{task}.jsonl").read_text().splitlines()]
        for sample, gold, doc in zip(samples, items[task]["gold"], items[task]["doc"], strict=True):
            likelihoods = [answer[0] for answer in sample["filtered_resps"]]
            if task in ("arc_challenge", "hellaswag"):
                texts = sample["doc"]["choices"] if task == "hellaswag" else sample["doc"]["choices"]["text"]
                likelihoods = [ll / len(text) for ll, text in zip(likelihoods, texts, strict=True)]
            right = {
                "arc_challenge": lambda d: "ABCD".index(d["answerKey"]),
                "hellaswag": lambda d: int(d["label"]),
                "winogrande": lambda d: int(d["answer"]) - 1,
                "mmlu_anatomy": lambda d: d["answer"],
            }[task](sample["doc"])
            e = np.exp(np.array(likelihoods) - max(likelihoods))
            assert gold == pytest.approx(e[right] / e.sum(), rel=1e-6)
            assert doc == sample["doc_hash"][:16]


def test_softmax_share():
    assert softmax_share([0.0, np.log(3)], [1]) == pytest.approx(0.75)
    assert softmax_share([-1000.0, -1001.0, -1002.0], [0, 2]) == pytest.approx(
        (1 + np.e**-2) / (1 + np.e**-1 + np.e**-2)
    )


@pytest.mark.slow
def test_readme_command_scores_all_62_tasks(at_board, capsys):
    """The README's merge-and-score command as printed, MMLU's 57 subjects included."""
    script.main(
        [
            "--recipe",
            "recipes/recipe.yml",
            "--save_path",
            "./models/merged_and_scored",
            "--eval_recipe",
            "recipes/open_llm_leaderboard.yml",
            "--output_path",
            "results.json",
            "--limit",
            "1",
        ]
    )
    document = json.loads((at_board / "results.json").read_text())
    tasks = document["summary"]["tasks"]
    assert {name: task["num_fewshot"] for name, task in tasks.items()} == {**SHOTS, "mmlu": 5}
    subjects = [leaf for leaf in document["items"] if leaf.startswith("mmlu_")]
    assert len(subjects) == 57 and tasks["mmlu"]["subjects"] == 57
    means = [np.mean(document["items"][leaf]["value"]) for leaf in subjects]
    assert np.mean(means) == pytest.approx(tasks["mmlu"]["value"])
    line = re.search(r"scoring .*", capsys.readouterr().out)[0]
    assert "mmlu (57 tasks) 57 items 5-shot" in line and "gsm8k 1 items 5-shot" in line and "float32" in line
