"""The README's own commands, in its order, as printed, on models small enough for a test."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_model, save_tasks

README = (ROOT / "README.md").read_text()
# The leaderboard's data sets and the Hub are out of reach here; everything else runs as it stands on the page.
LOCAL = {
    "recipes/open_llm_leaderboard.yml": "local_eval.yml",
    "--choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k": "--choose_on colours --report_on hues --eval_recipe local_eval.yml",
}


def commands() -> list[str]:
    """Every command in a ```bash block after the first (make), in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[1:]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def fill_hub_cache(home: Path, model: Path) -> None:
    """The Hub's cache after a download of mistralai/Mistral-7B-v0.1: a snapshot of links to blobs."""
    repository = home / "hub" / "models--mistralai--Mistral-7B-v0.1"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in model.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A copy of the repository with models/ as the README assumes it after the downloads."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("common", "merge_and_evaluate", "recipes"):
        shutil.copytree(ROOT / name, place / name)
    for script in ROOT.glob("*.py"):
        shutil.copy2(script, place)
    save_model(place / "original", 1, dtype="bfloat16")
    fill_hub_cache(place / "hf", place / "original")
    save_model(place / "models" / "WildMarcoroni-Variant1-7B", 1, dtype="bfloat16", scale=1.01)
    save_model(place / "models" / "WestSeverus-7B-DPO-v2", 1, dtype="float32", scale=0.98)
    save_tasks(place / "tasks", ("colours", "hues"))
    recipe = {"model": "hf", "include_path": "./tasks", "tasks": ["colours", "hues"], "batch_size": 4}
    (place / "local_eval.yml").write_text(json.dumps(recipe))
    return place


def run(command: str, place: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    return subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)


def test_every_command_runs_and_chains(workplace):
    found = commands()
    assert len(found) >= 9
    for command in found:
        command = re.sub(r" +", " ", command)
        for printed, local in LOCAL.items():
            command = command.replace(printed, local)
        done = run(command, workplace)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
    for output in ("Mistral-7b-v0.1-float16", "task_vector_westseverus", "pruned_vector_wildmarcoroni", "merged_cabs"):
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


def test_every_path_in_the_tree_exists():
    tree = re.search(r"## Files and Scripts\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    paths = [line.split()[0] for line in tree.splitlines()]
    assert paths
    assert all((ROOT / path).exists() for path in paths)
