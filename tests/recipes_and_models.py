"""What the tests of merging and scoring share: a recipe of three models, an eval recipe, the script that takes them.

base, wild, west    models of one shape (conftest.models), linked into the working directory by the fixture `here`
recipe.yml          RECIPE: base + 1.2 (wild - base) + 0.7 (west - base)
eval.yml            EVAL: two of the three tasks in tasks/
"""

from pathlib import Path

import yaml
from conftest import save_tasks

import merge_and_evaluate_7b

RECIPE = {
    "merge_method": "task_arithmetic",
    "base_model": "./base",
    "models": [
        {"model": "./wild", "parameters": {"weight": 1.2}},
        {"model": "./west", "parameters": {"weight": 0.7}},
    ],
    "dtype": "float32",
    "out_dtype": "float16",
}
TASKS = ("colours", "shades", "tints")
EVAL = {"model": "hf", "include_path": "./tasks", "tasks": ["colours", "shades"], "batch_size": 4}


def write_yaml(path: Path, value) -> None:
    """A recipe, keys in the order given."""
    path.write_text(yaml.safe_dump(value, sort_keys=False))


def set_the_table(folder: Path, models: Path) -> Path:
    """Link the models into a folder, beside the two recipes and the tasks; returns the folder."""
    for model in models.iterdir():
        (folder / model.name).symlink_to(model)
    save_tasks(folder / "tasks", TASKS)
    write_yaml(folder / "recipe.yml", RECIPE)
    write_yaml(folder / "eval.yml", EVAL)
    return folder


def left_over(folder: Path) -> set[str]:
    """What is there beside the inputs and lm-eval's log."""
    names = {path.name for path in folder.iterdir() if path.suffix != ".log"}
    return names - {"base", "wild", "west", "tasks", "recipe.yml", "eval.yml"}


def merge(*flags: str) -> None:
    """Merge by recipe.yml into merged/, without scoring."""
    merge_and_evaluate_7b.main(["--recipe", "recipe.yml", "--save_path", "merged", "--merge_only", *flags])


def merge_and_score(*flags: str) -> None:
    """Merge by recipe.yml into merged/ and score by eval.yml; with --weights or --weight_grid, a sweep."""
    merge_and_evaluate_7b.main(["--recipe", "recipe.yml", "--eval_recipe", "eval.yml", "--save_path", "merged", *flags])


def score(model: str, *flags: str) -> None:
    """Score a directory by eval.yml, without merging."""
    merge_and_evaluate_7b.main(["--eval_only", "--save_path", model, "--eval_recipe", "eval.yml", *flags])
