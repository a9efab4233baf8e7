"""The merge methods that stream: their parameters, which recipes stream, which can be read without mergekit.

mergekit's import takes seconds, so a recipe whose parameters are plain values does without: `is_plain` accepts only
what mergekit would accept too, and what it does not accept is left to mergekit's own checks (recipes.py), so that there
is one set of refusals.
"""

import os
import re
from dataclasses import dataclass

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
STREAMED_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method: its type (float, int, bool, str), and what it may be where mergekit does not say.

    per_model: may stand beside a model; needed: has no default. least/most: inclusive; choices: of text.
    """

    kind: type
    default: object = None
    per_model: bool = False
    needed: bool = False
    least: float = float("-inf")
    most: float = float("inf")
    choices: tuple[str, ...] = ()


# Up to so many differences torch's sum(dim=0), and so mergekit, adds in their order; beyond, in groups of 16.
IN_ORDER = 17
OURS = {"cabs": "nm", "magnitude": "magnitude", "random": "random"}  # {merge method: pruning method}
_WEIGHT = Parameter(float, per_model=True, needed=True)
_FLAG, _SET = Parameter(bool, False), Parameter(bool, True)
_OURS = {
    "weight": _WEIGHT,
    "vector_dtype": Parameter(str, "float16", choices=STREAMED_DTYPES),
    "consensus": Parameter(str, "none", choices=("none", "sign")),
}
# mergekit has no least density; what is 0 or below keeps nothing, so such a value is mergekit's to judge.
_DENSITY = Parameter(float, 0.25, per_model=True, least=1e-12, most=1.0)


def _deltas(normalize: bool, rescale: bool, least_density: float = float("-inf")) -> dict[str, Parameter]:
    """The parameters that task_arithmetic, ties, dare_linear and dare_ties share."""
    return {
        "weight": _WEIGHT,
        "density": Parameter(float, 1.0, per_model=True, least=least_density),
        "normalize": Parameter(bool, normalize),
        "rescale": Parameter(bool, rescale),
        "lambda": Parameter(float, 1.0),
        "int8_mask": _FLAG,
    }


METHODS: dict[str, dict[str, Parameter]] = {
    "linear": {"weight": _WEIGHT, "normalize": _SET},
    "task_arithmetic": _deltas(normalize=False, rescale=False),
    "ties": _deltas(normalize=True, rescale=False),
    # mergekit cannot draw with a probability below 0; ties takes that for "keep nothing".
    "dare_linear": _deltas(normalize=False, rescale=True, least_density=0.0),
    "dare_ties": _deltas(normalize=False, rescale=True, least_density=0.0),
    "cabs": {
        **_OURS,
        "n": Parameter(int, 64, per_model=True, least=1),
        "m": Parameter(int, 256, per_model=True, least=1),
        "conflict_aware": _SET,
    },
    "magnitude": {**_OURS, "density": _DENSITY, "conflict_aware": _FLAG, "rescale": _FLAG},
    "random": {**_OURS, "density": _DENSITY, "conflict_aware": _FLAG, "rescale": _FLAG, "seed": Parameter(int, 0)},
}


@dataclass(frozen=True)
class Values:
    """What holds for one tensor: `shared` parameters by name, `models` the same for each model that is summed."""

    shared: dict
    models: tuple[dict, ...]


# --- whether it streams ---------------------------------------------------------------------------


def stream_reason(config: dict) -> str | None:
    """Why mergekit has to merge a recipe, naming the recipe's key; None if it streams.

    stream_reason({"merge_method": "slerp", …}) -> "merge_method: slerp is not one of linear, task_arithmetic, …"
    """
    method = config.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        return f"merge_method: {method} is not one of {', '.join(METHODS)}"
    for key, value in config.items():
        if key not in KEYS and value is not None:
            return f"{key}: cuts or remaps what the models hold, or is not known to a streamed merge"
    for key in ("dtype", "out_dtype"):
        if config.get(key) == "float64":
            return f"{key}: float64 is summed and written by mergekit only"
    for model in [config.get("base_model"), *_models(config)]:
        # mergekit reads a+b as model a with LoRA b; a directory may have a plus in its name all the same.
        if isinstance(model, dict):
            return f"model: {model!r:.80} is mergekit's longer form of a path"
        if isinstance(model, str) and "+" in model and not os.path.isdir(model):
            return f"model: {model!r:.80} asks mergekit for more than a path (a LoRA)"
    # dare_* are not mergekit's bits anyway, by their masks, and `linear` adds in the recipe's order there as well.
    if method in ("task_arithmetic", "ties") and len(summed_models(config)) > IN_ORDER:
        return f"models: more than {IN_ORDER} differences are summed in an order of mergekit's own"
    return None


def model_path(model) -> str | None:
    """The path in a model reference: text, or mergekit's longer form {model: {path: …}}."""
    while isinstance(model, dict):
        model = model.get("model", model.get("path"))
    return model if isinstance(model, str) else None


def _models(config: dict) -> list[dict]:
    listed = config.get("models")
    return [entry.get("model") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def summed_models(config: dict) -> list[str]:
    """The paths of the models that are summed, in the recipe's order.

    linear sums a base_model as well, last unless it is in the list: so does mergekit. Elsewhere the base is what
    differences are taken from.
    """
    base, paths = model_path(config.get("base_model")), [model_path(model) for model in _models(config)]
    if config.get("merge_method") == "linear":
        return paths if base is None or base in paths else [*paths, base]
    return [path for path in paths if path != base]


# --- recipes that need no mergekit to be read ------------------------------------------------------


def is_plain(config: dict) -> bool:
    """Whether a recipe streams, is right, and all its parameters are plain values: nothing that needs mergekit.

    True only for what mergekit's own checks accept; False says nothing but "ask mergekit".
    """
    if stream_reason(config) or not _plain_shape(config):
        return False
    known, shared = METHODS[config["merge_method"]], config.get("parameters") or {}
    holders = [(shared, False), *((entry.get("parameters") or {}, True) for entry in config["models"])]
    return all(_plain_parameters(known, *holder) for holder in holders) and _plain_models(config)


def _plain_shape(config: dict) -> bool:
    """Nothing but known keys, a list of different models, dtypes by name, and a base where one is due."""
    entries, base = config.get("models"), config.get("base_model")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return False
    paths = [entry.get("model") for entry in entries]
    named = [*paths, *([] if base is None else [base])]
    if not all(isinstance(path, str) and path and not re.search(r"[+@\s]", path) for path in named):
        return False
    dtypes = [config[key] for key in ("dtype", "out_dtype") if config.get(key) is not None]
    mappings = [config.get("parameters"), *(entry.get("parameters") for entry in entries)]
    return (
        config.keys() <= set(KEYS)
        and all(entry.keys() <= {"model", "parameters"} for entry in entries)
        and len(set(paths)) == len(paths)
        and all(dtype in STREAMED_DTYPES for dtype in dtypes)
        and all(mapping is None or isinstance(mapping, dict) for mapping in mappings)
        and (config["merge_method"] == "linear" or (base is not None and bool(set(paths) - {base})))
    )


def _plain_parameters(known: dict[str, Parameter], given: dict, beside_a_model: bool) -> bool:
    return all(
        name in known and (known[name].per_model or not beside_a_model) and _plain_value(known[name], value)
        for name, value in given.items()
    )


def _plain_value(parameter: Parameter, value) -> bool:
    """Whether a value is of the parameter's own type, finite and in its range; mergekit converts others, or refuses."""
    if parameter.kind in (bool, str):
        return type(value) is parameter.kind and (not parameter.choices or value in parameter.choices)
    kinds = (int, float) if parameter.kind is float else (int,)
    return type(value) in kinds and abs(value) < 1e30 and parameter.least <= value <= parameter.most


def _plain_models(config: dict) -> bool:
    """Every model that is summed has what it needs; n at most m; no density that task_arithmetic would ignore."""
    method = config["merge_method"]
    given = [config.get("parameters") or {}, *(entry.get("parameters") or {} for entry in config["models"])]
    if method == "task_arithmetic" and any("density" in parameters for parameters in given):
        return False
    models = plain_values(config).models
    known = METHODS[method]
    complete = all(values[name] is not None for values in models for name in values if known[name].needed)
    return complete and all(values["n"] <= values["m"] for values in models if "n" in values)


def plain_values(config: dict) -> Values:
    """The values of a recipe where every parameter is plain: a model's own, or the recipe's, or the default."""
    known, shared = METHODS[config["merge_method"]], config.get("parameters") or {}
    beside = {model_path(entry.get("model")): entry.get("parameters") or {} for entry in config["models"]}

    def value(name: str, *holders: dict):
        found = next((holder[name] for holder in holders if name in holder), known[name].default)
        return float(found) if known[name].kind is float and found is not None else found

    models = tuple(
        {name: value(name, beside.get(path, {}), shared) for name in known if known[name].per_model}
        for path in summed_models(config)
    )
    return Values({name: value(name, shared) for name in known if not known[name].per_model}, models)
