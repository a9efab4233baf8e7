"""Score a model with lm-evaluation-harness."""

import json
import os
import random
from dataclasses import asdict
from importlib.metadata import version

from common.errors import DataError, reason_of
from common.shards.hashing import file_hash, text_hash
from common.shards.processes import group
from merge_and_evaluate.announcement import announcement
from merge_and_evaluate.eval_machine import device_of, on_this_machine
from merge_and_evaluate.eval_recipes import EvalRecipe, evaluator_config
from merge_and_evaluate.eval_tasks import Tasks, task_files
from merge_and_evaluate.in_memory import LoadedModel, fresh
from merge_and_evaluate.items import items_of_document


def load_tasks(recipe: EvalRecipe, tasks: Tasks) -> dict:
    """lm-eval's {tasks, groups, group_map}, data sets read. Seeded as lm-eval seeds itself, since some tasks shuffle
    their choices while they load (GPQA)."""
    import numpy as np

    seed = evaluator_config(recipe, "model").seed or [0, 1234]
    random.seed(seed[0])
    np.random.seed(seed[1])
    return tasks.manager.load(tasks.add_part_to_index())


def _roots(loaded: dict) -> list:
    """The groups and tasks that no other group holds: what lm-eval is given to score."""
    inner = {child for children in loaded["group_map"].values() for child in children}
    found = {**loaded["tasks"], **loaded["groups"]}
    return [item for name, item in found.items() if name not in inner]


def _simple_evaluate(config, loaded: dict, manager, cache: str | None, lm) -> dict | None:
    """lm-eval's results for one model, put together as `lm_eval run` does, samples included. config: lm-eval's own
    EvaluatorConfig; lm: lm-eval's model, None where it is to load the one that the config names."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker()
    results = simple_evaluate(
        model=lm or config.model,
        tasks=_roots(loaded),
        task_manager=manager,
        use_cache=cache,
        log_samples=True,
        evaluation_tracker=tracker,
        **_settings(config),
    )
    if results is None:  # another process of `accelerate launch` has them
        return None
    tracker.general_config_tracker.log_end_time()
    # Of a model that it did not load itself lm-eval records where it came from; the row names what the config names.
    asked = {**results["config"], "model": config.model}
    return {**results, "config": asked, **asdict(tracker.general_config_tracker)}


def _settings(config) -> dict:
    """What simple_evaluate takes from an EvaluatorConfig, as `lm_eval run` hands it over."""
    # One by one: an EvaluatorConfig holds more than simple_evaluate takes.
    requests = config.cache_requests if isinstance(config.cache_requests, dict) else {}
    return {
        "model_args": config.model_args,
        "num_fewshot": config.num_fewshot,
        "batch_size": config.batch_size,
        "max_batch_size": config.max_batch_size,
        "device": config.device,
        "limit": config.limit,
        "samples": config.samples,
        "check_integrity": config.check_integrity,
        "write_out": config.write_out,
        "predict_only": config.predict_only,
        "system_instruction": config.system_instruction,
        "apply_chat_template": config.apply_chat_template,
        "fewshot_as_multiturn": bool(config.fewshot_as_multiturn),
        "gen_kwargs": config.gen_kwargs or None,
        "random_seed": config.seed and config.seed[0],
        "numpy_random_seed": config.seed and config.seed[1],
        "torch_random_seed": config.seed and config.seed[2],
        "fewshot_random_seed": config.seed and config.seed[3],
        "cache_requests": requests.get("cache_requests", False),
        "rewrite_requests_cache": requests.get("rewrite_requests_cache", False),
        "delete_requests_cache": requests.get("delete_requests_cache", False),
        "confirm_run_unsafe_code": config.confirm_run_unsafe_code,
    }


def _cache(recipe: EvalRecipe, identity: str) -> str | None:
    """The response cache that `use_cache` asks for, kept apart by model and model_args: lm-eval keys it by request
    alone and would hand one model's answers to the next."""
    cache = recipe.config.get("use_cache")
    return f"{cache}_{text_hash(json.dumps([identity, recipe.model_args], default=str))}" if cache else None


def evaluate(
    recipe: EvalRecipe, model: str, tasks: Tasks, identity: str, filled: LoadedModel | None = None
) -> dict | None:
    """lm-eval's document for one model on these tasks, with `samples` and `items`; None in the helper processes of
    `accelerate launch`. Prints one line first: what is scored, and how.

    `identity` is the model's hash; `filled` a loaded model that holds its weights. Raises DataError with lm-eval's own
    reason if it fails.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    directory = str(filled.directory) if filled else model
    recipe = on_this_machine(recipe, directory)
    lm = fresh(filled) if filled else None
    try:
        loaded = load_tasks(recipe, tasks)
        if group().is_main:
            print(announcement(recipe, model, directory, loaded), flush=True)
        config, cache = evaluator_config(recipe, model), _cache(recipe, identity)
        document = _simple_evaluate(config, loaded, tasks.manager, cache, lm)
    except Exception as error:  # lm-eval and what it uses raise many types; the user needs the reason
        reason = reason_of(error)
        line = f"{recipe.path}: lm-eval could not score {model} on {', '.join(tasks.names)}: {reason:.300}"
        raise DataError(line) from error
    return document and {**document, "items": items_of_document(document, loaded["tasks"])}


def eval_identity(recipe: EvalRecipe, tasks: Tasks, model_identity: str) -> str:
    """What decides a score, as one hash: the model, the recipe with its flags, the kind of device, its tasks and their
    local data."""
    parts = {
        "model": model_identity,
        "recipe": recipe.config,
        # Where no recipe names one, the machine does: a CPU's float32 and a GPU's float16 differ by whole items.
        "device": device_of(recipe).partition(":")[0],
        "tasks": tasks.names,
        "part": tasks.part,
        "lm_eval": version("lm_eval"),
        "files": [[str(path), file_hash(path)] for path in task_files(recipe, tasks)],
    }
    # A function by its name: str() would add its address, which differs from run to run. Its code is in `files`, or is
    # lm-eval's own.
    return text_hash(
        json.dumps(parts, sort_keys=True, default=lambda value: getattr(value, "__qualname__", str(value)))
    )
