"""The value of every parameter of a streamed merge, tensor by tensor.

Plain values are the same for all tensors. Filters by name and gradients over layers are evaluated by mergekit's own
resolver, which is imported only then. Where a layer is in its stack is read off the tensors' names, so that mergekit
need not know the architecture.
"""

import re
from collections.abc import Iterable
from functools import partial

from common.errors import DataError
from merge_and_evaluate.recipe_paths import explicit_path, with_paths
from merge_and_evaluate.recipes import Recipe
from merge_and_evaluate.streamed_methods import Values, is_plain, plain_values, summed_models
from merge_and_evaluate.sum_inputs import sum_of_weights


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """{name: where its layer is in its stack, 0 to 1}: what mergekit evaluates gradients at.

    A stack is what is numbered first in a name, from 0 to count − 1 without a gap (`merger.mlp.0`, `merger.mlp.2` are
    no layers). Layer i is at i / (count − 1), the layer of a stack of one at 1, and what is in no layer at 0.
    layer_depths(["e", "h.0.w", "h.1.w", "h.2.w"]) -> {"e": 0.0, "h.0.w": 0.0, "h.1.w": 0.5, "h.2.w": 1.0}
    """
    found = {name: re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", name) for name in names}
    stacks: dict[str, set[int]] = {}
    for layer in filter(None, found.values()):
        stacks.setdefault(layer[1], set()).add(int(layer[2]))
    return {name: 0.0 if layer is None else _depth(int(layer[2]), stacks[layer[1]]) for name, layer in found.items()}


def _depth(index: int, stack: set[int]) -> float:
    if max(stack) + 1 != len(stack):
        return 0.0
    return index / (len(stack) - 1) if len(stack) > 1 else 1.0


def parameters_of(recipe: Recipe, names: Iterable[str], depths: dict[str, float] | None = None) -> dict[str, Values]:
    """{tensor: the value of every parameter}, for a recipe that streams; models as in summed_models.

    depths: where each tensor's layer is in its stack, as layer_depths() says of all tensors of the model; without it
    `names` are all there are. Of some of them alone it would say another thing: a stack with a gap is none.
    Raises DataError where a tensor has no value, or one that the method cannot use, before a weight is read.
    """
    names = list(names)
    if is_plain(recipe.config):
        values = plain_values(recipe.config)
        found = dict.fromkeys(names, values)
    else:
        found = _by_mergekit(recipe, names, layer_depths(names) if depths is None else depths)
    for name, values in found.items():
        _check(recipe, name, values)
    return found


def _by_mergekit(recipe: Recipe, names: list[str], depths: dict[str, float]) -> dict[str, Values]:
    """The same for filters, gradients and values in other types, evaluated by mergekit's own resolver."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import registry
    from mergekit.parameter_resolver import resolve_parameters

    from merge_and_evaluate.merge_methods import register

    register()
    method = registry.get(recipe.config["merge_method"])
    config = MergeConfiguration.model_validate(with_paths(recipe.config, explicit_path))  # str() is the path again
    beside = {str(entry.model): entry.parameters for entry in config.models or []}
    paths = summed_models(recipe.config)
    # Tensor by tensor: a filter looks at the name, a gradient at how deep its layer is, so no two need have the same.
    found = {}
    for name in names:
        resolve = partial(
            resolve_parameters,
            method.spec,
            tensor_name=name,
            inputs=dict.fromkeys(paths, name),
            sources=lambda model: (beside.get(model), config.parameters),
            t=depths[name],
        )
        try:
            shared, models = resolve()
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"{recipe.path}: tensor {name!r}: {_reason(error)}; fix the recipe's `parameters`"
            ) from None
        found[name] = Values(dict(shared), tuple(dict(models[path]) for path in paths))
    return found


def _reason(error: Exception) -> str:
    """mergekit's reason in one line; of pydantic's the first."""
    if hasattr(error, "errors"):
        first = error.errors()[0]
        return f"{first['msg'][:1].lower()}{first['msg'][1:]}, found {first['input']!r:.60}"
    return " ".join(str(error).split())


def _check(recipe: Recipe, name: str, values: Values) -> None:
    """What only the values of a tensor show. Raises DataError."""
    where = f"{recipe.path}: tensor {name!r}"
    for path, model in zip(summed_models(recipe.config), values.models, strict=True):
        if "n" in model and model["n"] > model["m"]:
            raise DataError(
                f"{where}: model {path}: n is {model['n']} and m is {model['m']}; cabs keeps n of every m, so n is at "
                "most m"
            )
    if recipe.config["merge_method"] == "linear" and values.shared["normalize"]:
        weights = tuple(model["weight"] for model in values.models)
        # In float32 as in the merge, where 0.1 + 0.2 - 0.3 is zero; what is zero before it is rounded is refused too.
        total = min(float(sum_of_weights(weights)), sum(weights), key=abs)
        if abs(total) < 1e-30:
            raise DataError(
                f"{where}: the weights sum to {total:g}, and linear divides by that; change a weight, or set "
                "normalize: false"
            )


def written_dtype(config: dict, dtypes: Iterable[str]) -> str:
    """What a tensor is written in: the recipe's out_dtype, else its dtype, else what its inputs promote to.

    dtypes: of all inputs, as safetensors says them. written_dtype({}, ["F16", "BF16"]) -> "F32"
    """
    codes = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    named = config.get("out_dtype") or config.get("dtype")
    distinct = set(dtypes)
    return codes[named] if named else distinct.pop() if len(distinct) == 1 else "F32"
