"""The tasks an eval recipe names: found in lm-eval's index, opened, identified."""

import os
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from common.errors import DataError
from merge_and_evaluate.eval_recipes import EvalRecipe


def leaf_tasks(index: dict, names: list[str]) -> list[str] | None:
    """The tasks that groups and tags stand for, or None if one of them is not in lm-eval's `index`."""
    leaves = []
    for name in names:
        entry = index.get(name)
        if entry is None:
            return None
        if entry.kind.name in ("TASK", "PY_TASK"):
            leaves.append(name)
            continue
        members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task") or []
        members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in members]
        inner = leaf_tasks(index, [member for member in members if isinstance(member, str)])
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
    """Names that lm-eval's TaskManager `manager` can load."""

    manager: object
    names: list[str]

    def only(self, names: list[str]) -> "Tasks":
        """The part of these tasks that `names` mean."""
        return Tasks(self.manager, list(dict.fromkeys(t for name in names for t in _matches(self.manager, name))))

    @property
    def leaves(self) -> list[str]:
        """The tasks themselves, where `names` may be groups; YAML files stand for themselves."""
        index = self.manager.task_index
        return [leaf for name in self.names for leaf in (leaf_tasks(index, [name]) if name in index else [name])]


def find_tasks(recipe: EvalRecipe, names: list[str]) -> Tasks:
    """The tasks that `names` mean. Raises DataError for one that nobody knows.

    Reading lm-eval's own 14,000 task files takes 8 seconds, so they are only read if the recipe's folder
    does not do.
    """
    from lm_eval.tasks import TaskManager

    include = recipe.config["include_path"]
    for with_own in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=with_own, metadata=recipe.metadata)
        unknown = [name for name in names if not _matches(manager, name)]
        if not unknown:
            return Tasks(manager, []).only(names)
    raise DataError(
        f"{recipe.path}: lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, "
        "include_path adds yours"
    )


def _data_files(config: dict) -> list[str]:
    """The local files in a task's `dataset_kwargs: {data_files: …}`."""
    found = (config.get("dataset_kwargs") or {}).get("data_files") or []
    found = list(found.values()) if isinstance(found, dict) else found
    found = (
        [found]
        if isinstance(found, str)
        else [p for item in found for p in ([item] if isinstance(item, str) else item)]
    )
    return [path for path in found if os.path.isfile(path)]


def task_files(recipe: EvalRecipe, tasks: Tasks) -> list[Path]:
    """The recipe's own task files, and the local data that its tasks read."""
    include = recipe.config["include_path"]
    files = {path for path in Path(include).rglob("*") if path.is_file()} if include else set()
    index = tasks.manager.task_index
    for name in tasks.leaves:
        files |= {Path(path) for path in _data_files(index[name].cfg or {})} if name in index else {Path(name)}
    return sorted(path for path in files if "__pycache__" not in path.parts)
