"""Merge recipes: read, checked, paths and weights set.

A recipe is mergekit's YAML. What mergekit would not read as it was meant is refused before a weight is read.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DataError
from merge_and_evaluate.recipe_checks import check_keys, check_method, is_number, method_of, scalars
from merge_and_evaluate.recipe_paths import entries, model_paths, one_spelling, with_paths
from merge_and_evaluate.streamed_methods import METHODS, is_plain, model_path
from merge_and_evaluate.yaml_files import read_yaml


@dataclass(frozen=True)
class Recipe:
    """A merge recipe: `text` as its author wrote it, `config` as mergekit will get it."""

    path: str
    text: str
    config: dict

    @property
    def name(self) -> str:
        return Path(self.path).stem


def read_recipe(path: str) -> Recipe:
    """The recipe at `path`, with every key, parameter and weight checked and paths made safe for mergekit."""
    text, config = read_yaml(path)
    config = with_paths(config, one_spelling())  # first, or a model that is listed twice would count as two
    if not is_plain(config):  # else the checks, which import mergekit, have nothing to find
        check_keys(path, config)
        check_method(path, config)
    return Recipe(path, text, config)


def with_models(recipe: Recipe, base_model: str | None, models: list[str] | None) -> Recipe:
    """The recipe with other paths: for its base, and for its other models in their order. Both may be None.

    DataError unless there are as many models as the recipe has.
    """
    import yaml

    if base_model is None and models is None:
        return recipe
    old_base, others = model_path(recipe.config.get("base_model")), model_paths(recipe.config)
    others = [path for path in others if path != old_base]  # linear lists the base among its models
    if models is not None and len(models) != len(others):
        raise DataError(
            f"{recipe.path}: --models names {len(models)} and the recipe has {len(others)} ({', '.join(others)}); "
            "name as many, in its order"
        )
    if base_model is not None and old_base is None:
        raise DataError(f"{recipe.path}: has no base_model that --base_model could replace; leave the flag out")
    new = dict(zip(others, models or others, strict=True)) | ({old_base: base_model or old_base} if old_base else {})
    spelled = one_spelling()
    config = with_paths(recipe.config, lambda path: spelled(new.get(path, path)))
    if not is_plain(config):
        check_method(recipe.path, config)
    return replace(recipe, config=config, text=yaml.safe_dump(config, sort_keys=False))


def draws(recipe: Recipe) -> bool:
    """Whether the merge method draws by --seed. Our `random` draws by the recipe's own `seed`."""
    return recipe.config["merge_method"].startswith(("dare_", "della", "arcee_fusion"))


# --- the weight, lambda ---------------------------------------------------------------------------


def weighted_entries(recipe: Recipe) -> list[dict]:
    """The entries whose weight a sweep can set: models, in the recipe's order, or else the recipe as a whole."""
    base = model_path(recipe.config.get("base_model"))
    models = [entry for entry in entries(recipe.config) if model_path(entry.get("model")) != base]
    found = [entry for entry in [*models, recipe.config] if "weight" in (entry.get("parameters") or {})]
    own = [entry for entry in found if entry is not recipe.config]
    if own and len(own) < len(models):
        raise DataError(
            f"{recipe.path}: some models have a `weight` of their own and others share one; a sweep needs one beside "
            "each, or the shared one alone"
        )
    found = own or found  # where each model has its own, the shared one sets none
    for entry in found:
        weight = entry["parameters"]["weight"]
        if not is_number(weight):
            raise DataError(
                f"{recipe.path}: {model_path(entry.get('model')) or 'parameters'}: weight is {weight!r:.60}; "
                "a sweep needs one number there, which it then replaces"
            )
    if not found:
        raise DataError(f"{recipe.path}: no model has a `weight` under its `parameters`; a sweep sets those")
    return found


def _defaults(path: str, name: str) -> dict:
    """{parameter of a method: its default}."""
    if name in METHODS:  # known without mergekit
        return {key: parameter.default for key, parameter in METHODS[name].items()}
    return {spec.name: spec.default for spec in method_of(path, name).spec.parameters}


def _is_set(value) -> bool:
    """Whether a flag is set as mergekit reads it, which takes text as well: "false" is not."""
    return value.lower() in ("true", "t", "yes", "y", "on", "1") if isinstance(value, str) else bool(value)


def _base_keeps_weight(recipe: Recipe) -> bool:
    """Whether what is summed includes a base whose weight a sweep leaves as it is, so that equal weights do not cancel:
    `linear` sums a base as it does the models."""
    config, base = recipe.config, model_path(recipe.config.get("base_model"))
    if config["merge_method"] != "linear" or base is None:
        return False
    holders = [entry for entry in entries(config) if model_path(entry.get("model")) == base]
    if all(entry is not config for entry in weighted_entries(recipe)):
        holders.append(config)  # the shared weight, which is then set for no model
    own = [entry["parameters"]["weight"] for entry in holders if "weight" in (entry.get("parameters") or {})]
    return any(not is_number(weight) or float(weight) for weight in scalars(own[:1]))


def swept_lambda(recipe: Recipe) -> bool:
    """Whether equal weights scale this merge through the recipe's `lambda` (methods that normalise weights)."""
    method, parameters = recipe.config["merge_method"], recipe.config.get("parameters") or {}
    known = _defaults(recipe.path, method)
    flag = "normalize_weights" if "normalize_weights" in known else "normalize"  # multislerp's, that of all others
    setting = method == "nuslerp" or parameters.get(flag, known.get(flag, False))  # nuslerp has none, and always does
    if not any(map(_is_set, scalars(setting))) or _base_keeps_weight(recipe):
        return False
    if "lambda" not in parameters:
        instead = ", or a `lambda` for the sweep," if "lambda" in known else ""
        remedy = f"set `{flag}: false`{instead} under `parameters`"
        raise DataError(
            f"{recipe.path}: merge_method {method} divides by the sum of the weights, so equal weights cancel; "
            f"{'give --weight_grid for each model' if method == 'nuslerp' else remedy}"
        )
    return True


def with_weights(recipe: Recipe, weights: tuple[float, ...]) -> Recipe:
    """The recipe with weights[i] for its i-th weighted model; one weight alone is for all of them."""
    import yaml

    changed = replace(recipe, config=deepcopy(recipe.config))
    models = weighted_entries(changed)
    if len(weights) == 1 and swept_lambda(changed):
        changed.config["parameters"]["lambda"] = weights[0]
    elif len(weights) in (1, len(models)):
        for entry, weight in zip(models, weights * len(models), strict=False):
            entry["parameters"]["weight"] = weight
    else:
        raise DataError(
            f"{recipe.path}: {len(weights)} grids of weights for {len(models)} models with a weight; "
            "give --weight_grid once per model, in the recipe's order"
        )
    return replace(changed, text=yaml.safe_dump(changed.config, sort_keys=False))
