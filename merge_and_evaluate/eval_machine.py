"""An eval recipe on this machine: which device, which dtype."""

from dataclasses import replace
from pathlib import Path

from common.shards.documents import read_json
from merge_and_evaluate.eval_recipes import EvalRecipe

TRANSFORMERS = ("hf", "hf-auto", "huggingface")


def device_of(recipe: EvalRecipe) -> str:
    """Where lm-eval will put the model: what the recipe says, else cuda if it is there, else the CPU."""
    import torch

    return recipe.config.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")


def stored_dtype(model: str) -> str | None:
    """The dtype that a model directory's config.json names: 'float16'."""
    config = Path(model) / "config.json"
    found = read_json(config) if config.is_file() else {}
    return found.get("dtype") or found.get("torch_dtype")


def on_this_machine(recipe: EvalRecipe, model: str) -> EvalRecipe:
    """The recipe as it is carried out for `model`: a float16 model on a CPU is scored in float32 unless the recipe
    or --dtype says otherwise, since float16 is about 4 times slower there and float32 holds every one of its values."""
    told = "dtype" in recipe.model_args or recipe.backend not in TRANSFORMERS
    if told or device_of(recipe) != "cpu" or stored_dtype(model) != "float16":
        return recipe
    return replace(recipe, config={**recipe.config, "model_args": {**recipe.model_args, "dtype": "float32"}})


def dtype_is_raised(recipe: EvalRecipe, model: str) -> bool:
    """Whether the float16 model in directory `model` is scored in float32 by this recipe."""
    return recipe.model_args.get("dtype") == "float32" and stored_dtype(model) == "float16"
