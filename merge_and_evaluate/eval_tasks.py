"""The tasks an eval recipe names: found in lm-eval's index, opened, identified."""

import os
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

from common.errors import DataError
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.eval_settings import TASK_KINDS, listed, part_of_recipe, settings_of_members, shots

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst")


def leaf_tasks(index: dict, names: list[str]) -> list[str] | None:
    """The tasks that groups and tags stand for, or None if one of them is not in lm-eval's `index`."""
    leaves = []
    for name in names:
        entry = index.get(name)
        if entry is None:
            return None
        if entry.kind.name in TASK_KINDS:
            leaves.append(name)
            continue
        inner = leaf_tasks(index, sorted(entry.tags) if entry.kind.name == "TAG" else listed(index, entry.cfg or {}))
        if inner is None:
            return None
        leaves += inner
    return list(dict.fromkeys(leaves))


def _matches(manager, name: str) -> list[str]:
    """The tasks that one entry of `tasks` means, as for lm_eval: a name, a pattern, YAML files, or a folder."""
    matched = manager.match_tasks([name])
    if not matched:
        pattern = os.path.join(name, "*.yaml") if os.path.isdir(name) else name
        return sorted(glob(pattern)) if pattern.endswith(".yaml") else []
    return matched if leaf_tasks(manager.task_index, matched) is not None else []


@dataclass(frozen=True)
class Tasks:
    """Names that lm-eval's TaskManager `manager` can load. `recipe_names` are those of the eval recipe they are a
    part of: a task in one of its groups keeps that group's settings, however it is named."""

    manager: object
    names: list[str]
    recipe_names: list[str]

    def only(self, names: list[str]) -> "Tasks":
        """The part of these tasks that `names` mean."""
        return replace(self, names=list(dict.fromkeys(t for name in names for t in _matches(self.manager, name))))

    @property
    def leaves(self) -> list[str]:
        """The tasks themselves, where `names` may be groups; YAML files stand for themselves."""
        index = self.manager.task_index
        return [leaf for name in self.names for leaf in (leaf_tasks(index, [name]) if name in index else [name])]

    @property
    def part(self) -> list[dict]:
        """What lm-eval is told where the bare names would lose the recipe's settings; else []."""
        return part_of_recipe(self.manager.task_index, self.recipe_names, self.names)

    def add_part_to_index(self) -> list[str]:
        """The names that lm-eval is to load: `names`, or one group of them that carries the recipe's settings and is
        added to the manager's index."""
        part = self.part
        if not part:
            return self.names
        index = self.manager.task_index
        name = f"part of {', '.join(self.recipe_names)}: {', '.join(self.names)}"
        groups = (entry for entry in index.values() if entry.kind.name == "GROUP")
        index[name] = replace(next(groups), name=name, yaml_path=None, tags=set(), cfg={"group": name, "task": part})
        return [name, *(file for file in self.names if file not in index)]

    def shots(self, given: int | None) -> dict[str, int | None]:
        """{task: demonstrations in its prompts; None if not known}, from the task files alone; `given` is the recipe's
        num_fewshot."""
        index = self.manager.task_index
        known = settings_of_members(index, [*self.recipe_names, *self.names])
        found = {leaf: None for leaf in self.leaves}  # a YAML file by its path: known once it is loaded
        for leaf in found.keys() & index.keys():
            own = {**(index[leaf].cfg or {}), **known.get(leaf, {})}.get("num_fewshot")
            found[leaf] = shots(own, given)
        return found


def find_tasks(recipe: EvalRecipe, names: list[str]) -> Tasks:
    """The tasks that `names` mean. Raises DataError for one that lm-eval does not know.

    Reading lm-eval's own 14,000 task files takes 8 seconds, so they are only read if the recipe's folder
    does not do.
    """
    from lm_eval.tasks import TaskManager

    include = recipe.config["include_path"]
    for with_own in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=with_own, metadata=recipe.metadata)
        unknown = [name for name in [*names, *recipe.tasks] if not _matches(manager, name)]
        if not unknown:
            in_recipe = Tasks(manager, [], []).only(recipe.tasks).names
            return Tasks(manager, [], in_recipe).only(names)
    raise DataError(
        f"{recipe.path}: lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, "
        "include_path adds yours"
    )


def check_task_code(recipe: EvalRecipe, tasks: Tasks) -> None:
    """DataError for a task whose own Python needs a package that is not installed (MATH, IFEval): lm-eval would find
    out once the model is merged."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = tasks.manager.task_index
    for name in tasks.leaves:
        path = index[name].yaml_path if name in index else None
        try:
            if path:
                load_yaml(path, resolve_func=True)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{recipe.path}: task {name!r} needs a package that is not installed: {reason:.90}; install it (for "
                "tasks of lm-eval's own leaderboard: pip install 'lm_eval[math,ifeval]')"
            ) from None


# --- local files ----------------------------------------------------------------------------------


def _named_data_files(config: dict) -> list[str]:
    """What a task's `dataset_kwargs: {data_files: …}` names."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    named = list(named.values()) if isinstance(named, dict) else [named]
    return [path for item in named for path in ([item] if isinstance(item, str) else item)]


def _data_files(config: dict) -> list[str]:
    """Those of them that are files here."""
    return [path for path in _named_data_files(config) if os.path.isfile(path)]


def check_data_files(recipe: EvalRecipe, tasks: Tasks) -> None:
    """DataError for a local data file that a task names and that is not there: better said before the merge."""
    index = tasks.manager.task_index
    for name in tasks.leaves:
        config = (index[name].cfg if name in index else None) or {}
        data_dir = config.get("dataset_kwargs", {}).get("data_dir") if config.get("dataset_kwargs") else None
        for path in _named_data_files(config):
            elsewhere = "://" in path or data_dir or any(sign in path for sign in "*?[") or os.path.exists(path)
            if not elsewhere and path.endswith(DATA_SUFFIXES) and _is_local(config):
                raise DataError(
                    f"{recipe.path}: task {name!r} reads {path}, which is not there; make it, or fix the path"
                )


def _is_local(config: dict) -> bool:
    """Whether data_files are paths as seen from here: for the loaders of plain files, not for a Hub data set."""
    return config.get("dataset_path") in ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")


def task_files(recipe: EvalRecipe, tasks: Tasks) -> list[Path]:
    """The recipe's own task files, and the local data that its tasks read."""
    include = recipe.config["include_path"]
    files = {path for path in Path(include).rglob("*") if path.is_file()} if include else set()
    index = tasks.manager.task_index
    for name in tasks.leaves:
        files |= {Path(path) for path in _data_files(index[name].cfg or {})} if name in index else {Path(name)}
    return sorted(path for path in files if "__pycache__" not in path.parts)
