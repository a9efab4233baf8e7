"""Imports point one way between the rooms (common/__init__.py): read from the files, whether they run or not."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

STREAMING = ("convert_dtype", "extract_task_vector_7b", "prune_task_vector_7b")
ROOMS = ("common", "common.shards", "common.pruners", "merge_and_evaluate")
# What a shard's room may know of pruning: nothing. A record's file name is spelled where it is checked.
SHARDS_MAY_IMPORT_OF_PRUNERS: set[str] = set()


def file_of(module: str) -> Path | None:
    """'common.errors' -> common/errors.py; None for what is no file of the repository."""
    path = ROOT / module.replace(".", "/")
    found = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in found if file.is_file()), None)


@cache
def imports(file: Path) -> set[str]:
    """The repository's modules that a file imports, at its top or in a function: from common import cli ->
    common.cli."""
    named = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides which room it is from"
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in named if file_of(module)}


def closure(module: str) -> set[str]:
    """What a module imports, and what that imports, and so on."""
    found, waiting = set(), {module}
    while waiting:
        found |= (new := waiting - found)
        waiting = {imported for module in new for imported in imports(file_of(module))} - found
    return found - {module}


def inside(room: str, modules: set[str]) -> set[str]:
    return {module for module in modules if f"{module}.".startswith(f"{room}.")}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("file", files_of("common"), ids=lambda file: str(file.relative_to(ROOT)))
def test_common_knows_nothing_of_the_fourth_script(file):
    assert not inside("merge_and_evaluate", imports(file))
    assert not imports(file) & {*STREAMING, "merge_and_evaluate_7b"}, "a room imports no script"


@pytest.mark.parametrize("script", STREAMING)
def test_the_first_three_scripts_do_not_reach_scoring(script):
    assert not inside("merge_and_evaluate", closure(script))


@pytest.mark.parametrize("file", files_of("common/shards"), ids=lambda file: file.name)
def test_shards_know_nothing_of_pruning(file):
    assert inside("common.pruners", imports(file)) <= SHARDS_MAY_IMPORT_OF_PRUNERS


@pytest.mark.parametrize("file", files_of("common/pruners/kernels"), ids=lambda file: file.name)
def test_kernels_know_neither_names_nor_files(file):
    assert not inside("common.shards", imports(file))


def test_who_converts_reads_one_room():
    """convert needs the shards' room and the kernels; of pruning and its pictures nothing."""
    found = closure("convert_dtype")
    assert inside("common.pruners", found) == inside("common.pruners.kernels", found) | {"common.pruners"}
    assert len(found) <= 44


@pytest.mark.slow
@pytest.mark.parametrize("script", [*STREAMING, "merge_and_evaluate_7b"])
def test_help_is_quick(script):
    """Importing a script imports nothing that takes seconds; that comes with the first weight."""
    heavy = {"torch", "numba", "transformers", "mergekit", "lm_eval", "matplotlib", "scipy"}
    code = f"import sys, {script}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_lists_its_files(room):
    """Each room's __init__.py names every file in it, and none that is not there; a line each."""
    folder = ROOT / room.replace(".", "/")
    listed = [
        line.split()[0]
        for line in ast.get_docstring(ast.parse((folder / "__init__.py").read_text())).splitlines()
        if line[:1].isalpha() and line.split()[0].endswith((".py", "/"))
    ]
    present = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    present |= {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
    assert sorted(listed) == sorted(present)


def test_no_test_imports_another():
    """What two share is a helper's: an import would run the other's fixtures, and tie its tests to where they are."""
    for file in sorted((ROOT / "tests").glob("*.py")):
        found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in found if (node.module or "").startswith("test_")], file.name
