"""Every recipe is loaded by its tool, and the commands in its header are ones that the tools accept."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, save_model
from workplace import bash_commands, row_commands

import merge_and_evaluate_7b
import prune_task_vector_7b
from merge_and_evaluate.recipe_paths import model_paths
from merge_and_evaluate.recipes import read_recipe

EVAL_RECIPES = ("open_llm_leaderboard", "open_llm_leaderboard_v2", "metabench", "metabench_secondary")
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yml") if path.stem not in EVAL_RECIPES)
LEADERBOARD = ROOT / "recipes" / "open_llm_leaderboard.yml"
CHAIN = [
    "Mistral-7b-v0.1-float16",
    "WildMarcoroni-Variant1-7B",
    "WestSeverus-7B-DPO-v2",
    "pruned_vector_wildmarcoroni",
    "pruned_vector_westseverus",
]


def header_commands(path: Path) -> list[list[str]]:
    """The commands in a recipe's header comment, split as a shell would."""
    header = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    found = re.findall(r"^   ((?:python|mergekit-yaml|lm_eval) (?:.*\\\n)*.*)$", header, re.M)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


@pytest.fixture(scope="module")
def tiny_repository(tmp_path_factory) -> Path:
    """A folder that looks like the repository after the README's chain, with tiny models."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for seed, name in enumerate(CHAIN):
        save_model(folder / "models" / name, seed)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_mergekit_loads_it(path):
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    assert config.out_dtype == "float16" and config.dtype == "float32"
    assert all(model.startswith("./models/") for model in model_paths(read_recipe(str(path)).config))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_commands_use_it_and_parse(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the clone may have models already, made by the README's commands
    commands = header_commands(path)
    assert commands
    for command in commands:
        assert f"recipes/{path.name}" in command
        if command[0] == "python":
            args = merge_and_evaluate_7b.parse_args(command[2:])
            assert args.recipe == [Path("recipes", path.name)] and args.save_path.startswith("./models/merged")
    assert any(command[0] == "python" for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_merges_as_its_header_says(path, tiny_repository, monkeypatch):
    monkeypatch.chdir(tiny_repository)
    command = next(command for command in header_commands(path) if command[0] == "python")
    args = merge_and_evaluate_7b.parse_args(command[2:])
    merge_and_evaluate_7b.main(["--recipe", str(args.recipe[0]), "--save_path", args.save_path, "--merge_only"])
    from safetensors.numpy import load_file

    merged, base = (load_file(f"{folder}/model.safetensors") for folder in (args.save_path, f"./models/{CHAIN[0]}"))
    assert merged.keys() == base.keys()
    assert all(tensor.dtype == np.float16 for tensor in merged.values())
    assert any((merged[name] != base[name]).any() for name in base)


def test_mergekit_yaml_runs_the_recipe_as_pasted(tiny_repository, monkeypatch):
    """The real command, offline, into ./models/merged_by_mergekit: same tensors as our script's, tokenizer copied."""
    from click.testing import CliRunner
    from mergekit.scripts.run_yaml import main as mergekit_yaml
    from safetensors.numpy import load_file

    monkeypatch.chdir(tiny_repository)
    result = CliRunner().invoke(mergekit_yaml, ["recipes/recipe.yml", "./models/merged_by_mergekit"])
    assert result.exit_code == 0, result.output
    merge_and_evaluate_7b.main(["--recipe", "recipes/recipe.yml", "--save_path", "./models/ours", "--merge_only"])
    theirs, ours = (load_file(f"models/{name}/model.safetensors") for name in ("merged_by_mergekit", "ours"))
    assert all((theirs[name] == ours[name]).all() for name in theirs)
    assert (tiny_repository / "models/merged_by_mergekit/tokenizer.json").is_file()


def test_orders_differ_only_in_order():
    first, second = (read_recipe(str(ROOT / "recipes" / f"{name}.yml")).config for name in ("cabs", "cabs_west_first"))
    assert first["models"] == second["models"][::-1]


def test_the_commands_of_the_readme_parse():
    """recipes/README.md: each way of pruning is one that prune takes, and they all differ; no recipe is left out."""
    text = (ROOT / "recipes" / "README.md").read_text()
    commands = [*bash_commands(text), *row_commands(text).values()]
    pruned = [prune_task_vector_7b.parse_args(shlex.split(c)[2:]) for c in commands if "prune_task_vector_7b.py" in c]
    assert len({str(args) for args in pruned}) == len(pruned) == 10
    for path in RECIPES:
        assert f"`{path.name}`" in text


# --- lm-eval --------------------------------------------------------------------------------------


def test_lm_eval_accepts_the_leaderboard_config(monkeypatch):
    """Its keys are lm-eval's, read by lm-eval; the command in the header is one that its parser takes."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    monkeypatch.chdir(ROOT)
    lm_eval_command = next(command for command in header_commands(LEADERBOARD) if command[0] == "lm_eval")
    monkeypatch.setattr("sys.argv", lm_eval_command)
    config = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    assert config.model_args == {"pretrained": "./models/merged"} and config.tasks == ["open_llm_leaderboard"]
    assert config.batch_size == 8 and Path(config.include_path).is_dir()
    ours = next(command for command in header_commands(LEADERBOARD) if command[0] == "python")
    assert merge_and_evaluate_7b.parse_args(ours[2:]).eval_only


@pytest.mark.slow
def test_the_leaderboard_group_sets_the_shots(monkeypatch):
    """lm-eval's own TaskManager builds all 62 tasks offline; only the download of their data is left out."""
    from lm_eval.api.task import ConfigurableTask, TaskConfig

    from merge_and_evaluate.eval_recipes import read_eval_recipe
    from merge_and_evaluate.eval_tasks import find_tasks

    def without_data(task, config, **_):
        task._config = TaskConfig(**{key: value for key, value in config.items() if key != "class"})

    monkeypatch.setattr(ConfigurableTask, "__init__", without_data)
    monkeypatch.setattr(ConfigurableTask, "task_name", property(lambda task: task._config.task))
    monkeypatch.chdir(ROOT)
    recipe = read_eval_recipe("recipes/open_llm_leaderboard.yml")
    tasks = find_tasks(recipe, recipe.tasks)
    loaded = tasks.manager.load(tasks.names)
    shots = {name: task._config.num_fewshot for name, task in loaded["tasks"].items()}
    subjects = {name: count for name, count in shots.items() if name.startswith("mmlu_")}
    assert len(subjects) == 57 and set(subjects.values()) == {5}
    assert {name: count for name, count in shots.items() if name not in subjects} == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
    assert loaded["group_map"]["open_llm_leaderboard"] == [
        "arc_challenge",
        "hellaswag",
        "mmlu",
        "truthfulqa_mc2",
        "winogrande",
        "gsm8k",
    ]
