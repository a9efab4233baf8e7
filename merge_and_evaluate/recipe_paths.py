"""The models that a recipe names, and their paths: of its config, mergekit's YAML as Python has it."""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from common.shards.places import plain
from merge_and_evaluate.streamed_methods import model_path


def as_list(value) -> list:
    return value if isinstance(value, list) else []


def _modules(config: dict) -> list[dict]:
    """The recipe itself, and each part under `modules`."""
    modules = config.get("modules")
    parts = modules.values() if isinstance(modules, dict) else []
    return [config, *(part for part in parts if isinstance(part, dict))]


def _slices(part: dict) -> list[dict]:
    return [each for each in as_list(part.get("slices")) if isinstance(each, dict)]


def entries(config: dict) -> list[dict]:
    """The mappings that name an input model: under `models`, `slices` and `modules`, in the recipe's order."""
    found = []
    for part in _modules(config):
        found += as_list(part.get("models"))
        for each in _slices(part):
            found += as_list(each.get("sources"))
    return [entry for entry in found if isinstance(entry, dict)]


def named(config: dict) -> list[tuple[dict, str]]:
    """(mapping, key) wherever a recipe names a model: the base, models, then bases that slices have of their own."""
    bases = [(each, "base_model") for part in _modules(config) for each in _slices(part)]
    return [(config, "base_model"), *((entry, "model") for entry in entries(config)), *bases]


def model_paths(config: dict) -> list[str]:
    """Every model a recipe names, base first, each once."""
    paths = [model_path(holder.get(key)) for holder, key in named(config)]
    return list(dict.fromkeys(path for path in paths if path))


def safe_path(path: str) -> str:
    """'models/x', 'models/x/', '~/x' -> './models/x', … where that is a directory: mergekit's model card looks a path
    with at most one slash up on the Hub, and fails offline before it has copied the tokenizer."""
    if not path or not (place := plain(Path(os.path.expanduser(path)))).is_dir():
        return path
    return str(place) if place.is_absolute() or str(place).startswith(".") else f"./{place}"


def one_spelling() -> Callable[[str], str]:
    """A function that spells paths as safe_path() does, and a directory always as it was given first.

    'models/x' -> './models/x', and from then on '/work/models/x' -> './models/x': mergekit tells models apart by text.
    """
    first: dict[str, str] = {}

    def spelled(path: str) -> str:
        path = safe_path(path)
        return first.setdefault(os.path.abspath(path), path) if os.path.isdir(path) else path

    return spelled


def explicit_path(path: str) -> str | dict:
    """A directory with '+' or '@' in its path in mergekit's longer form: as text it would be a LoRA or a revision."""
    return {"model": {"path": path}} if set(path) & set("+@") and os.path.isdir(path) else path


def with_paths(config: dict, new_path: Callable[[str], str | dict]) -> dict:
    """The recipe's config with new_path(path) in place of every model's path, the base's first."""
    config = deepcopy(config)
    for holder, key in named(config):
        model, path = holder.get(key), model_path(holder.get(key))
        if isinstance(model, str):
            holder[key] = new_path(path)
        elif path is not None and "model" in model:  # the longer form; what else it says stays
            inner = model["model"] if isinstance(model["model"], dict) else {}
            holder[key] = model | {"model": inner | {"path": model_path(new_path(path))}}
    return config
