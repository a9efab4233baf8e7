"""What of a recipe is refused: keys, parameters and values that mergekit would ignore or could not read.

A typing error would merge something else than was meant. mergekit, imported here where it is asked, takes seconds.
"""

import math

from common.errors import DataError
from merge_and_evaluate.recipe_paths import as_list, entries, explicit_path, named, with_paths
from merge_and_evaluate.streamed_methods import OURS, STREAMED_DTYPES, model_path

MERGED_DTYPES = (*STREAMED_DTYPES, "float64")  # mergekit's, which has the names from torch


def _refuse_unknown(path: str, where: str, mapping, known) -> None:
    if not isinstance(mapping, dict):
        raise DataError(f"{path}: {where} is {mapping!r:.60}; it must be a mapping of keys to values")
    for key in mapping:
        if key not in known:
            raise DataError(f"{path}: unknown key {key!r} in {where}; known: {', '.join(known)}")


def _check_holder(path: str, where: str, holder, known) -> None:
    """The same of a mapping with `parameters`, whose conditions (filter, value) have keys as well."""
    from mergekit.config import ConditionalParameter

    _refuse_unknown(path, where, holder, known)
    parameters = holder.get("parameters")
    for name, setting in parameters.items() if isinstance(parameters, dict) else ():
        for part in setting if isinstance(setting, list) else [setting]:
            if isinstance(part, dict):
                _refuse_unknown(path, f"a condition of {name}", part, ConditionalParameter.model_fields)


def _check_slices(path: str, slices) -> None:
    from mergekit.config import InputSliceDefinition, OutputSliceDefinition

    for part in as_list(slices):
        _check_holder(path, "slices", part, OutputSliceDefinition.model_fields)
        if part.get("sources") == []:
            raise DataError(f"{path}: slices: `sources` is empty; name a model there and a layer_range")
        for source in as_list(part.get("sources")):
            _check_holder(path, "slices: sources", source, InputSliceDefinition.model_fields)


def _check_models(path: str, models) -> None:
    from mergekit.config import InputModelDefinition

    for entry in as_list(models):
        _check_holder(path, "models", entry, InputModelDefinition.model_fields)


def _check_reference(path: str, model: dict) -> None:
    """mergekit's longer form of a model: nothing in it but a path, since only that is opened, compared and merged."""
    from mergekit.common import ModelPath, ModelReference

    _refuse_unknown(path, "a model", model, ModelReference.model_fields)
    inner = model.get("model")
    if isinstance(inner, dict):
        _refuse_unknown(path, "the path of a model", inner, ModelPath.model_fields)
        if inner.get("revision"):
            raise DataError(
                f"{path}: model {model_path(model)} asks for a revision, {inner['revision']}; download that revision "
                "and name its directory"
            )
    if model.get("lora"):
        lora = model_path(model["lora"]) or model["lora"]
        raise DataError(
            f"{path}: model {model_path(model)} asks for a LoRA, {lora!s:.80}; merge it first (peft's "
            "merge_and_unload()), or extract and prune it (extract_task_vector_7b.py takes adapters), and name that "
            "directory"
        )


def check_keys(path: str, config: dict) -> None:
    """Refuse keys that mergekit would ignore, and values that it cannot read."""
    from mergekit.config import MergeConfiguration, OutputModuleDefinition
    from mergekit.tokenizer.config import TokenizerConfig
    from pydantic import ValidationError

    _check_holder(path, "the recipe", config, MergeConfiguration.model_fields)
    modules = config.get("modules") if isinstance(config.get("modules"), dict) else {}
    for part in [config, *modules.values()]:
        if part is not config:
            _check_holder(path, "modules", part, OutputModuleDefinition.model_fields)
        _check_models(path, part.get("models"))
        _check_slices(path, part.get("slices"))
    for holder, key in named(config):
        if isinstance(holder.get(key), dict):
            _check_reference(path, holder[key])
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


def method_of(path: str, name: str):
    """mergekit's merge method of that name, or ours."""
    from mergekit.merge_methods import registry

    from merge_and_evaluate.merge_methods import register

    register()
    known = {method.spec.name: method for method in registry.registered_methods()}
    if name not in known:
        raise DataError(f"{path}: unknown merge_method {name!r}; known: {', '.join(sorted(known))}")
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


def scalars(setting) -> list:
    """The plain values in a parameter setting: one value, a gradient, or values with filters."""
    if isinstance(setting, dict):
        return scalars(setting.get("value"))
    if isinstance(setting, list):
        return [scalar for item in setting for scalar in scalars(item)]
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
        for value in scalars(parameters[spec.name]) if spec.name in parameters else []:
            line = f"{path}: {where}: {spec.name} is {value!r:.60}"
            if spec.value_type is float and not is_number(value):
                raise DataError(f"{line}; it must be a finite number")
            if spec.name == "density" and method.spec.name.startswith("dare_") and float(value) < 0:
                raise DataError(f"{line}; it is the probability of being kept, so it must be 0 or more")
            try:
                spec.validate(value)
            except ValueError as error:
                reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
                raise DataError(f"{line}; {reason[:1].lower()}{reason[1:]}") from None


def _check_counts(path: str, method, holders: list[tuple[str, dict, bool]]) -> None:
    """n:m of our cabs: whole numbers, n at most m, for every model.

    What filters give is compared tensor by tensor (parameters.py): the largest n may be another tensor's.
    """
    specs = {spec.name: spec for spec in method.spec.parameters}
    defaults = {name: spec.default for name, spec in specs.items()}
    (_, shared, _), *models = holders
    for where, parameters, _ in models:
        n, m = ({**defaults, **shared, **parameters}[name] for name in ("n", "m"))
        for name, setting in (("n", n), ("m", m)):
            if isinstance(setting, list) and len(setting) > 1 and not any(isinstance(item, dict) for item in setting):
                raise DataError(f"{path}: {where}: {name} is the gradient {setting!r:.60}; it must be one whole number")
        if isinstance(n, list | dict) or isinstance(m, list | dict):
            continue
        if specs["n"].validate(n) > specs["m"].validate(m):  # which may be text, "64"
            raise DataError(f"{path}: {where}: n is {n} and m is {m}; cabs keeps n of every m, so n is at most m")


def _check_dtypes(path: str, config: dict) -> None:
    if config.get("dtype") == "float64" and config["merge_method"] in OURS:
        raise DataError(f"{path}: {config['merge_method']} sums in float32; set dtype: float32")
    for key in ("dtype", "out_dtype"):
        if config.get(key) and config[key] not in MERGED_DTYPES:
            raise DataError(f"{path}: {key} is {config[key]!r:.60}; it must be one of {', '.join(MERGED_DTYPES)}")


def _check_inputs(path: str, method, config: dict) -> None:
    """As many models as the method takes, each once, and a base if it needs one."""
    base, models = (
        model_path(config.get("base_model")),
        [model_path(e.get("model")) for e in as_list(config.get("models"))],
    )
    if "" in (base, *models):
        raise DataError(f"{path}: the path of a model is empty; write it out, or leave out the entry")
    try:
        method.validate_inputs(models if base is None or base in models else [*models, base], base)
    except ValueError as error:
        raise DataError(f"{path}: merge_method {method.spec.name}: {error}; fix the recipe") from None
    if method.spec.contract.base.value == "required" and set(models) == {base}:
        raise DataError(f"{path}: names no model besides the base, {base}; add those to be merged into it")


def check_method(path: str, config: dict) -> None:
    """Refuse parameters that the merge method ignores or lacks, and values it cannot use."""
    method = method_of(path, config["merge_method"])
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
    if method.spec.name == "cabs":  # last: n and m are compared with each other, so each must be a number by now
        _check_counts(path, method, holders)
