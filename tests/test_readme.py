"""The README's own commands, in its order, as printed, on models small enough for a test."""

import json
import re

import pytest
import yaml
from conftest import ROOT
from workplace import bash_commands, run_all

README = (ROOT / "README.md").read_text()
# The leaderboard's data sets and the Hub are out of reach here; everything else runs as it stands on the page.
LOCAL = {
    "recipes/open_llm_leaderboard.yml": "local_eval.yml",
    "--choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k": (
        "--choose_on colours --report_on hues --eval_recipe local_eval.yml"
    ),
}


@pytest.mark.slow
def test_every_command_runs_and_chains(workplace):
    found = [command for command in bash_commands(README) if not command.startswith("make ")]  # which makes a .venv
    assert len(found) >= 9
    for printed, local in LOCAL.items():
        found = [command.replace(printed, local) for command in found]
    run_all(found, workplace)
    for output in (
        "Mistral-7b-v0.1-float16",
        "task_vector_westseverus",
        "pruned_vector_wildmarcoroni",
        "merged_cabs",
    ):
        assert (workplace / "models" / output / "model.safetensors").is_file()
    for results in ("results.json", "results_best.json"):
        assert "summary" in json.loads((workplace / results).read_text())


def test_seed_commands_are_there():
    """The README keeps every script and flag of the page it mirrors."""
    for words in (
        "python convert_dtype.py\n",
        "--finetuned_model_path models/WildMarcoroni-Variant1-7B",
        "--task_vector_path1",
        "--save_directory2",
        '--pruning_method "nm"',
        "mergekit-yaml recipes/recipe.yml ./models/merged",
        "lm_eval run --config recipes/open_llm_leaderboard.yml --model_args pretrained=./models/merged",
    ):
        assert words in README


def test_the_recipe_on_the_page_is_the_file():
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "recipes" / "recipe.yml").read_text())


def test_every_file_that_is_linked_exists():
    for page in (
        "README.md",
        "recipes/README.md",
        "benchmarks/README.md",
        "examples/tiny_mistral/README.md",
        "examples/smollm2/README.md",
    ):
        links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
        assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_path_in_the_tree_exists():
    tree = re.search(r"## Files and Scripts\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    paths = [line.split()[0] for line in tree.splitlines()]
    assert paths
    assert all((ROOT / path).exists() for path in paths)
