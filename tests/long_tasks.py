"""What the tests of races and searches share: tasks with many items, and stand-ins for lm-eval that know the answer.

save_long_tasks   the three tasks of TASKS, hundreds of items
without_models    a race without models; an item is right by a score that peaks at weight 0.9
whole_document    what stands in for lm-eval where a whole model is scored
stopping_after    a race that is interrupted after so many batches

conftest.py has the fixtures: long_tasks, asked.
"""

import json
import math

import numpy as np
from recipes_and_models import merge_and_score, write_yaml

from merge_and_evaluate import racing, scoring

TASKS = {"colours": 120, "shades": 60, "tints": 80}  # items of each
EVAL = {"model": "hf", "include_path": "./tasks", "tasks": list(TASKS), "batch_size": 16, "device": "cpu"}
LOSS = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]}


def save_long_tasks(folder, times: int = 1) -> None:
    """The three tasks with many different items, answers drawn at random: candidates of random weights score by
    chance."""
    things = ["sky", "grass", "snow", "coal", "blood", "lemon"]
    colours = ["blue", "green", "white", "black", "red", "yellow"]
    for task, count in TASKS.items():
        draw, lines = np.random.default_rng(list(TASKS).index(task)), []
        for _ in range(times * count):
            text = "the " + " ".join(draw.choice(things, 5))
            lines.append(
                {"thing": text, "choices": draw.permutation(colours)[:4].tolist(), "gold": int(draw.integers(4))}
            )
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = json.loads((folder / f"{task}.yaml").read_text())
        config["dataset_kwargs"]["data_files"]["test"] = str(data)
        (folder / f"{task}.yaml").write_text(json.dumps(config))


def change_task(here, name: str, **settings) -> None:
    """Settings of a task's file, replaced."""
    path = here / "tasks" / f"{name}.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def group_of(here, name: str, tasks: list, **settings) -> None:
    """A group of these tasks (names, or groups and tasks written in place), in the folder of tasks."""
    write_yaml(here / "tasks" / f"{name}.yaml", {"group": name, "task": tasks, **settings})


def without_models(monkeypatch) -> list[tuple[str, str, int]]:
    """Stand in for lm-eval: an item is right if its number, spread evenly over 0..1, is below a score that peaks at
    weight 0.9. Returns every (candidate, task, item) that is asked for. No model is loaded or merged to be scored."""
    found, weight, label = [], [], []

    def model_to_score(making, candidate, name, save_path):
        weight[:] = [model["parameters"]["weight"] for model in candidate.merge.recipe.config["models"]]
        label[:] = [candidate.label]
        return candidate.model(name)

    def score_items(lm, recipe, loaded, metrics, samples):
        records = {}
        for task, numbers in samples.items():
            found.extend((label[0], task, number) for number in numbers)
            score = 0.9 - 0.2 * abs(np.mean(weight) - 0.9)
            spread = [(number * 0.618034) % 1 for number in numbers]
            records[task] = {
                "doc": [f"{number:016x}" for number in numbers],
                "value": [int(x < score) for x in spread],
                "gold": [min(0.99, max(0.01, score + 0.1 * math.sin(number))) for number in numbers],
            }
        return records

    class Nothing:
        def __enter__(self):
            return None

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(racing, "model_to_score", model_to_score)
    monkeypatch.setattr(racing, "score_items", score_items)
    monkeypatch.setattr(racing, "opened", lambda *_: Nothing())
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    return found


def whole_document(recipe, model, tasks, identity, filled=None) -> dict:
    """What stands in for lm-eval where the winner is reported."""
    scores = {name: {"acc,none": 0.5, "acc_stderr,none": 0.01} for name in tasks.names}
    empty = ("group_subtasks", "n-shot", "n-samples", "higher_is_better", "versions", "configs")
    return {"results": scores, **{key: {} for key in empty}}


def stopping_after(batches: int, score_items):
    """score_items that is interrupted, as by Ctrl-C, once it has scored so many batches."""
    scored = []

    def stops(*args):
        if len(scored) == batches:
            raise KeyboardInterrupt
        scored.append(score_items(*args))
        return scored[-1]

    return stops


def race(*flags: str) -> None:
    """A race between weights of recipe.yml, on eval.yml."""
    merge_and_score("--race", *flags)


def results(here) -> dict:
    """results.json."""
    return json.loads((here / "results.json").read_text())
