"""Merge recipes: read, check, set weights.

A recipe is mergekit's YAML. mergekit ignores keys and parameters it does not know, so a typing
error would merge something else than was meant; here it is refused before a weight is read.
"""

import math
import os
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DataError
from common.shards.places import plain
from merge_and_evaluate.streamed_methods import METHODS, is_plain, model_path
from merge_and_evaluate.yaml_files import read_yaml

DTYPES = ("float16", "bfloat16", "float32", "float64")


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
    plain = is_plain(config)  # then the checks below, which import mergekit, have nothing to find
    if not plain:
        check_keys(path, config)
    config = with_paths(config, safe_path)
    if not plain:
        check_method(path, config)
    return Recipe(path, text, config)


# --- what a recipe consists of --------------------------------------------------------------------


def _as_list(value) -> list:
    return value if isinstance(value, list) else []


def entries(config: dict) -> list[dict]:
    """The mappings that name an input model: under `models`, `slices` and `modules`, in the recipe's order."""
    found = list(_as_list(config.get("models")))
    for part in _as_list(config.get("slices")):
        found += _as_list(part.get("sources")) if isinstance(part, dict) else []
    modules = config.get("modules")
    for part in modules.values() if isinstance(modules, dict) else []:
        found += entries(part) if isinstance(part, dict) else []
    return [entry for entry in found if isinstance(entry, dict)]


def model_paths(config: dict) -> list[str]:
    """Every model a recipe names, base first, each once."""
    paths = [model_path(config.get("base_model"))] + [model_path(entry.get("model")) for entry in entries(config)]
    return list(dict.fromkeys(path for path in paths if path))


def safe_path(path: str) -> str:
    """'models/x', 'models/x/', '~/x' -> './models/x', … where that is a directory: mergekit's model card looks a path
    with at most one slash up on the Hub, and fails offline before it has copied the tokenizer."""
    if not path or not (place := plain(Path(os.path.expanduser(path)))).is_dir():
        return path
    return str(place) if place.is_absolute() or str(place).startswith(".") else f"./{place}"


def explicit_path(path: str) -> str | dict:
    """A directory with '+' or '@' in its path in mergekit's longer form: as text it would be a LoRA or a revision."""
    return {"model": {"path": path}} if set(path) & set("+@") and os.path.isdir(path) else path


def with_paths(config: dict, new_path) -> dict:
    """The recipe's config with new_path(path) in place of every model's path."""
    config = deepcopy(config)
    for holder, key in [(config, "base_model")] + [(entry, "model") for entry in entries(config)]:
        if isinstance(holder.get(key), str):
            holder[key] = new_path(holder[key])
    return config


def with_models(recipe: Recipe, base_model: str | None, models: list[str] | None) -> Recipe:
    """The recipe with other paths: for its base, and for its other models in their order. Both may be None.

    DataError unless there are as many models as the recipe has.
    """
    import yaml

    if base_model is None and models is None:
        return recipe
    old_base, others = model_path(recipe.config.get("base_model")), model_paths(recipe.config)
    others = [path for path in others if path != old_base]
    if models is not None and len(models) != len(others):
        raise DataError(
            f"{recipe.path}: --models names {len(models)} and the recipe has {len(others)} ({', '.join(others)}); "
            "name as many, in its order"
        )
    if base_model is not None and old_base is None:
        raise DataError(f"{recipe.path}: has no base_model that --base_model could replace; leave the flag out")
    new = dict(zip(others, models or others, strict=True)) | ({old_base: base_model or old_base} if old_base else {})
    config = with_paths(recipe.config, lambda path: safe_path(new.get(path, path)))
    if not is_plain(config):
        check_method(recipe.path, config)
    return replace(recipe, config=config, text=yaml.safe_dump(config, sort_keys=False))


# --- refusals -------------------------------------------------------------------------------------


def _refuse_unknown(path: str, where: str, mapping, known) -> None:
    if not isinstance(mapping, dict):
        raise DataError(f"{path}: {where} is {mapping!r:.60}, needed is a mapping of keys to values")
    for key in mapping:
        if key not in known:
            raise DataError(f"{path}: unknown key {key!r} in {where}; known are {', '.join(known)}")


def _check_slices(path: str, slices) -> None:
    from mergekit.config import InputSliceDefinition, OutputSliceDefinition

    for part in _as_list(slices):
        _refuse_unknown(path, "slices", part, OutputSliceDefinition.model_fields)
        for source in _as_list(part.get("sources")):
            _refuse_unknown(path, "slices: sources", source, InputSliceDefinition.model_fields)


def _check_models(path: str, models) -> None:
    from mergekit.config import InputModelDefinition

    for entry in _as_list(models):
        _refuse_unknown(path, "models", entry, InputModelDefinition.model_fields)


def check_keys(path: str, config: dict) -> None:
    """Refuse keys that mergekit would ignore, and values that it cannot read."""
    from mergekit.config import MergeConfiguration, OutputModuleDefinition
    from mergekit.tokenizer.config import TokenizerConfig
    from pydantic import ValidationError

    _refuse_unknown(path, "the recipe", config, MergeConfiguration.model_fields)
    modules = config.get("modules") if isinstance(config.get("modules"), dict) else {}
    for part in [config, *modules.values()]:
        if part is not config:
            _refuse_unknown(path, "modules", part, OutputModuleDefinition.model_fields)
        _check_models(path, part.get("models"))
        _check_slices(path, part.get("slices"))
    if isinstance(config.get("tokenizer"), dict):
        _refuse_unknown(path, "tokenizer", config["tokenizer"], TokenizerConfig.model_fields)
    try:
        # As it is merged: a '+' or '@' in a directory's name would be read as a LoRA or a revision.
        MergeConfiguration.model_validate(with_paths(config, explicit_path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the recipe"
        raise DataError(f"{path}: {where}: {first['msg']}; fix the recipe") from None
    except RuntimeError as error:
        raise DataError(f"{path}: {error}; fix the recipe") from None


def _method(path: str, name: str):
    """mergekit's merge method of that name, or ours."""
    from mergekit.merge_methods import registry

    from merge_and_evaluate.merge_methods import register

    register()
    known = {method.spec.name: method for method in registry.registered_methods()}
    if name not in known:
        raise DataError(f"{path}: unknown merge_method {name!r}; known are {', '.join(sorted(known))}")
    return known[name]


def _ignores_density(method) -> bool:
    """task_arithmetic accepts `density` and silently does nothing with it."""
    return hasattr(method, "sparsification_method") and method.sparsification_method is None


def _check_names(path: str, method, where: str, parameters: dict, per_model: bool) -> None:
    specs = {spec.name: spec for spec in method.spec.parameters}
    for name in parameters:
        if name not in specs or (name == "density" and _ignores_density(method)):
            used = [known for known in specs if known != "density" or not _ignores_density(method)]
            raise DataError(
                f"{path}: {where}: merge_method {method.spec.name} ignores the parameter {name!r}; "
                f"it uses {', '.join(used) or 'none'}"
            )
        if per_model and specs[name].scope.value == "shared":
            raise DataError(
                f"{path}: {where}: {name!r} holds for the whole merge and is ignored here; "
                "move it to the `parameters` at the end of the recipe"
            )


def _scalars(setting) -> list:
    """The plain values in a parameter setting: one value, a gradient, or values with filters."""
    if isinstance(setting, dict):
        return _scalars(setting.get("value"))
    if isinstance(setting, list):
        return [scalar for item in setting for scalar in _scalars(item)]
    return [setting]


def is_number(value) -> bool:
    """True for 1, 0.5 and YAML's text '1e-1'; False for true, text, NaN, infinity."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _check_values(path: str, method, where: str, parameters: dict) -> None:
    """Each value must be what the method's parameter takes; numbers must be finite."""
    for spec in method.spec.parameters:
        for value in _scalars(parameters[spec.name]) if spec.name in parameters else []:
            line = f"{path}: {where}: {spec.name} is {value!r:.60}"
            if spec.value_type is float and not is_number(value):
                raise DataError(f"{line}, needed is a finite number")
            try:
                spec.validate(value)
            except ValueError as error:
                reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
                raise DataError(f"{line}; {reason[:1].lower()}{reason[1:]}") from None


def _check_counts(path: str, method, holders: list[tuple[str, dict, bool]]) -> None:
    """n:m of our cabs: whole numbers, n at most m, for every model."""
    defaults = {spec.name: spec.default for spec in method.spec.parameters}
    (_, shared, _), *models = holders
    for where, parameters, _ in models:
        n, m = ({**defaults, **shared, **parameters}[name] for name in ("n", "m"))
        for name, setting in (("n", n), ("m", m)):
            if isinstance(setting, list) and len(setting) > 1 and not any(isinstance(item, dict) for item in setting):
                raise DataError(f"{path}: {where}: {name} is the gradient {setting!r:.60}, needed is one whole number")
        if max(_scalars(n)) > min(_scalars(m)):
            raise DataError(
                f"{path}: {where}: n is {max(_scalars(n))} and m is {min(_scalars(m))}; cabs keeps n of every "
                "m, so n is at most m"
            )


def _check_dtypes(path: str, config: dict) -> None:
    for key in ("dtype", "out_dtype"):
        if config.get(key) and config[key] not in DTYPES:
            raise DataError(f"{path}: {key} is {config[key]!r:.60}, needed is one of {', '.join(DTYPES)}")


def _check_inputs(path: str, method, config: dict) -> None:
    """As many models as the method takes, each once, and a base if it needs one."""
    base, models = (
        model_path(config.get("base_model")),
        [model_path(e.get("model")) for e in _as_list(config.get("models"))],
    )
    if "" in (base, *models):
        raise DataError(f"{path}: the path of a model is empty; write it out, or leave out the entry")
    try:
        method.validate_inputs(models if base is None or base in models else [*models, base], base)
    except ValueError as error:
        raise DataError(f"{path}: merge_method {method.spec.name}: {error}; fix the recipe") from None


def check_method(path: str, config: dict) -> None:
    """Refuse parameters that the merge method ignores or lacks, and values it cannot use."""
    method = _method(path, config["merge_method"])
    _check_dtypes(path, config)
    if config.get("models"):
        _check_inputs(path, method, config)
    shared = config.get("parameters") or {}
    holders = [("parameters", shared, False)]
    holders += [
        (f"model {model_path(entry.get('model'))}", entry.get("parameters") or {}, True) for entry in entries(config)
    ]
    for where, parameters, per_model in holders:
        _check_names(path, method, where, parameters, per_model)
        _check_values(path, method, where, parameters)
    needed = [spec.name for spec in method.spec.input_parameters if spec.required and spec.name not in shared]
    for where, parameters, _ in holders[1:]:
        missing = [name for name in needed if parameters.get(name) in (None, [])]
        if missing and config.get("models") and where != f"model {model_path(config.get('base_model'))}":
            raise DataError(f"{path}: {where} has no {missing[0]}; merge_method {method.spec.name} needs one per model")
    if method.spec.name == "cabs":
        _check_counts(path, method, holders)


# --- the weight, lambda ---------------------------------------------------------------------------


def weighted_entries(recipe: Recipe) -> list[dict]:
    """The entries whose weight a sweep can set: models, in the recipe's order, or else the recipe as a whole."""
    base = model_path(recipe.config.get("base_model"))
    models = [entry for entry in entries(recipe.config) if model_path(entry.get("model")) != base]
    found = [entry for entry in [*models, recipe.config] if "weight" in (entry.get("parameters") or {})]
    found = [entry for entry in found if entry is not recipe.config] or found
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


def _normalizes(path: str, name: str) -> bool:
    """Whether a method divides by the sum of the weights unless told otherwise."""
    if name in METHODS:  # known without mergekit
        return "normalize" in METHODS[name] and METHODS[name]["normalize"].default
    return next((spec.default for spec in _method(path, name).spec.parameters if spec.name == "normalize"), False)


def swept_lambda(recipe: Recipe) -> bool:
    """Whether equal weights scale this merge through the recipe's `lambda` (methods that normalise weights)."""
    parameters = recipe.config.get("parameters") or {}
    normalizes = _normalizes(recipe.path, recipe.config["merge_method"])
    if not parameters.get("normalize", normalizes):
        return False
    if "lambda" not in parameters:
        raise DataError(
            f"{recipe.path}: merge_method {recipe.config['merge_method']} divides by the sum of the weights, so equal "
            "weights cancel; set `normalize: false`, or a `lambda` for the sweep, under `parameters`"
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
