"""The repository as a user has it after the downloads, with models small enough for a test, and a shell in it.

The commands of README.md and recipes/README.md run in such a place as they are printed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, save_model, save_tasks

DOWNLOADED = ("WildMarcoroni-Variant1-7B", "WestSeverus-7B-DPO-v2")


def bash_commands(page: str) -> list[str]:
    r"""Every command in the ```bash blocks of a Markdown page, in order: a line each, "a \\\n  b" -> "a b"; a loop is
    one.
    """
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ")
    return [
        re.sub(r" +", " ", found) for found in re.findall(r"^for .*?^done$|^[^\n]+$", lines, re.DOTALL | re.MULTILINE)
    ]


def row_commands(page: str) -> dict[str, str]:
    """{row: its command} of a table of what to write in place of a part of one command that is printed above it."""
    place, rows = re.search(
        r"^\| row \| in place of `(.*?)` \|\n\|---\|---\|\n((?:\|.*\n)+)", page, re.MULTILINE
    ).groups()
    command = next(command for command in bash_commands(page) if place in command)
    flags = dict(re.findall(r"^\| (.*?) \| `(.*?)` \|$", rows, re.MULTILINE))
    return {row: command.replace(place, own) for row, own in flags.items()}


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


def make_workplace(place: Path) -> Path:
    """A copy of the repository with models/ as the README assumes it after the downloads; returns `place`."""
    for name in ("common", "merge_and_evaluate", "recipes"):
        shutil.copytree(ROOT / name, place / name)
    for script in ROOT.glob("*.py"):
        shutil.copy2(script, place)
    save_model(place / "original", 1, dtype="bfloat16")
    fill_hub_cache(place / "hf", place / "original")
    save_model(place / "models" / DOWNLOADED[0], 1, dtype="bfloat16", scale=1.01)
    save_model(place / "models" / DOWNLOADED[1], 1, dtype="float32", scale=0.98)
    save_tasks(place / "tasks", ("colours", "hues"))
    recipe = {"model": "hf", "include_path": "./tasks", "tasks": ["colours", "hues"], "batch_size": 4}
    (place / "local_eval.yml").write_text(json.dumps(recipe))
    return place


def shell(command: str, place: Path, **environment: str) -> subprocess.CompletedProcess:
    """One command in a shell whose working directory is `place`: this Python, the Hub and data sets offline."""
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    everything = os.environ | own | environment
    return subprocess.run(["bash", "-e", "-c", command], cwd=place, env=everything, capture_output=True, text=True)


def run_all(commands: list[str], place: Path) -> None:
    """Run commands one after the other; the first that fails, or shows a traceback, fails the test with its output."""
    for command in commands:
        done = shell(command, place)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-2000:]}"
